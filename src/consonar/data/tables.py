"""Parquet and Arrow files as shards of pictures: a row each."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from consonar.data.huggingface import Columns
from consonar.data.picture_files import Row, Unread
from consonar.data.shard_files import shard_file
from consonar.errors import OnlyInOrder, reading

ROWS_PER_BATCH = 64
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
MAX_GROUP = 2**28
"""Bytes, in the columns that are read, of a row group of Parquet, all of which is read for one picture."""


class LastPiece(threading.local):
    """What a thread has read last: the row group or batch `where` (shard, number)."""

    where: tuple[int, int] | None = None
    rows: Any = None


@dataclass(frozen=True)
class Tables:
    """Files of a `kind`, parquet or arrow, at `paths`, called `names`, with the same columns."""

    kind: str
    paths: Sequence[str]
    names: Sequence[str]
    columns: Columns
    last: LastPiece = field(default_factory=LastPiece, compare=False)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.columns.class_names

    def pictures(self, shard: int) -> Iterator[Unread]:
        """All rows of a file."""
        kept, number = self.columns.kept, itertools.count()
        with shard_file(self.paths[shard], self.kind) as file:
            if self.kind == "parquet":
                batches = parquet.ParquetFile(file).iter_batches(ROWS_PER_BATCH, columns=kept)
            else:
                batches = arrow_batches(file)
            for batch in batches:
                for row in rows_of(batch.select(kept)):
                    yield self.columns.unread(row, f"{self.names[shard]}/{next(number)}")

    def check_any_order(self, shard: int) -> None:
        """Raises `OnlyInOrder` for Parquet in larger groups than are read for one picture."""
        if self.kind == "arrow":
            return
        with self.mapped(shard) as file:
            whole = parquet.ParquetFile(file).metadata
        largest = max((self.group_bytes(whole.row_group(piece)) for piece in range(whole.num_row_groups)), default=0)
        if largest > MAX_GROUP:
            size = f"row groups of {largest / 1e6:.0f} MB, all of which is read for one picture"
            path = self.paths[shard]
            raise OnlyInOrder(f"data: {path}: {size}; write smaller ones, or copy them once: hf:FOLDER")

    def group_bytes(self, group: Any) -> int:
        """Of the columns that are read; the fields of a picture are columns below its own."""
        columns = map(group.column, range(group.num_columns))
        below = tuple(f"{name}." for name in self.columns.kept)
        return sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(below))

    def rows(self, shard: int) -> Iterator[Row]:
        """Piece and place in it of every row, and what is said of it; no picture is read."""
        columns = self.columns
        told = [name for name in (columns.label, columns.caption) if name]
        with self.mapped(shard) as file:
            for piece, (count, batch) in enumerate(self.pieces(file, told)):
                for place, row in enumerate(rows_of(batch) if told else [{}] * count):
                    yield Row(piece, place, columns.label_of(row), columns.caption_in(row))

    def pieces(self, file: Any, names: list[str]) -> Iterator[tuple[int, Any]]:
        """Number of rows and these columns of each row group or batch."""
        if self.kind == "arrow":
            yield from ((batch.num_rows, batch.select(names)) for batch in arrow_batches(file))
            return
        whole = parquet.ParquetFile(file)
        for piece in range(whole.num_row_groups):
            yield whole.metadata.row_group(piece).num_rows, whole.read_row_group(piece, columns=names)

    def picture(self, shard: int, number: int, piece: int, place: int) -> Unread:
        """Row `number`, at its place in its piece, which the thread keeps until it reads another one."""
        kept, last = self.columns.kept, self.last
        with self.mapped(shard) as file:
            if last.where != (shard, piece):
                last.where = last.rows = None  # before the next one is read: a thread never holds two
                if self.kind == "parquet":
                    last.rows = parquet.ParquetFile(file).read_row_group(piece, columns=kept)
                else:
                    last.rows = next(itertools.islice(arrow_batches(file), piece, None)).select(kept)
                last.where = shard, piece
            (row,) = rows_of(last.rows.slice(place, 1))
        return self.columns.unread(row, f"{self.names[shard]}/{number}")

    @contextmanager
    def mapped(self, shard: int) -> Iterator[Any]:
        """A file of this machine, of which only what is looked at is read."""
        with reading(self.paths[shard], f"a shard ({self.kind})"), pa.memory_map(self.paths[shard]) as file:
            yield file


def rows_of(table: Any) -> list[Any]:
    """Those of a table or batch of Arrow, which follows damaged offsets anywhere."""
    table.validate(full=True)
    return list(table.to_pylist())


def features_of(kind: str, file: IO[bytes]) -> Any:
    """The column types, as `datasets` knows them."""
    from datasets import Features

    return Features.from_arrow_schema(parquet.read_schema(file) if kind == "parquet" else arrow_reader(file).schema)


def arrow_reader(file: IO[bytes]) -> Any:
    """Batches of an Arrow file of either format."""
    if file.read(6) == b"ARROW1":
        return pa.ipc.open_file(file)
    file.seek(-len(END_OF_STREAM), 2)
    if file.read() != END_OF_STREAM:  # which Arrow takes for a shorter one where the cut is between two batches
        raise ValueError("no end of the stream")
    file.seek(0)
    return pa.ipc.open_stream(file)


def arrow_batches(file: IO[bytes]) -> Iterator[Any]:
    reader = arrow_reader(file)
    count = getattr(reader, "num_record_batches", None)
    return iter(reader) if count is None else map(reader.get_batch, range(count))
