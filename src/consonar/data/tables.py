"""Parquet and Arrow files as shards of pictures: a row each."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from consonar.data.huggingface import Columns
from consonar.data.picture_files import Row, Unread
from consonar.data.shard_files import shard_file
from consonar.errors import UserError, reading

ROWS_PER_BATCH = 64
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
MAX_GROUP = 2**28
"""Bytes of a row group of Parquet, all of which is read for one picture."""


@dataclass(frozen=True)
class Tables:
    """Files of a `kind`, parquet or arrow, at `paths`, called `names`, with the same columns."""

    kind: str
    paths: Sequence[str]
    names: Sequence[str]
    columns: Columns

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

    def rows(self, shard: int) -> Iterator[Row]:
        """Piece and place in it of every row, and what is said of it; no picture is read."""
        columns = self.columns
        told = [name for name in (columns.label, columns.caption) if name]
        with self.mapped(shard) as file:
            for piece, (count, batch) in enumerate(self.pieces(file, told, self.paths[shard])):
                for place, row in enumerate(rows_of(batch) if told else [{}] * count):
                    yield Row(piece, place, columns.label_of(row), columns.caption_in(row))

    def pieces(self, file: Any, names: list[str], path: str) -> Iterator[tuple[int, Any]]:
        """Number of rows and these columns of each row group or batch."""
        if self.kind == "arrow":
            yield from ((batch.num_rows, batch.select(names)) for batch in arrow_batches(file))
            return
        whole = parquet.ParquetFile(file)
        for piece in range(whole.num_row_groups):
            group = whole.metadata.row_group(piece)
            if group.total_byte_size > MAX_GROUP:
                size = f"row groups of {group.total_byte_size / 1e6:.0f} MB, all of which is read for one picture"
                raise UserError(f"data: {path}: {size}; write smaller ones, or copy them once: hf:FOLDER")
            yield group.num_rows, whole.read_row_group(piece, columns=names)

    def picture(self, shard: int, number: int, piece: int, place: int) -> Unread:
        """Row `number`, at its place in its piece."""
        kept = self.columns.kept
        with self.mapped(shard) as file:
            if self.kind == "parquet":
                found = parquet.ParquetFile(file).read_row_group(piece, columns=kept)
            else:
                found = next(itertools.islice(arrow_batches(file), piece, None)).select(kept)
            (row,) = rows_of(found.slice(place, 1))
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
