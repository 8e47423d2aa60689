"""Shards on this machine in any order: where every picture lies, what is said of it, found once and kept in the cache.

An index takes some 30 bytes a picture and its caption, mapped from the disk. Labels and captions that are asked for are
objects of Python, some hundreds of bytes a picture.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from consonar.data.picture_files import Row, ShardStream, Unread, decoding_threads
from consonar.data.store_format import check_buffers
from consonar.errors import reading
from consonar.files.lock import making
from consonar.files.writers import cache_dir, keep
from consonar.types import ImageRecord, ImageSource

VERSION = 1
SCHEMA = pa.schema(
    {"shard": pa.int32(), "start": pa.int64(), "stop": pa.int64(), "label": pa.int64(), "caption": pa.string()}
)
REMEDY = "delete it, it is made again"


@dataclass(eq=False)
class IndexedShards:
    """A stream as an `IndexedSource` of the `pictures` that an index says; each of them is found by `picture`, from its
    shard, its number there, and what its `Row` has as start and stop."""

    stream: ShardStream
    pictures: pa.Table
    picture: Callable[[int, int, int, int], Unread]

    def __post_init__(self) -> None:
        self.name, self.class_names = self.stream.name, self.stream.class_names
        self.content_hash = self.stream.content_hash
        self.shards, self.starts, self.stops = (
            self.pictures.column(name).to_numpy() for name in ("shard", "start", "stop")
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.stream)  # no piece of a shard is looked for, or read, twice

    def read(self, index: int) -> ImageRecord:
        """Picture `index`, decoded."""
        shard = int(self.shards[index])
        number = index - int(np.searchsorted(self.shards, shard))
        return self.picture(shard, number, int(self.starts[index]), int(self.stops[index])).read()

    def picture_name(self, index: int) -> str:
        """Its name, for which it is read."""
        return self.read(index).name

    @property
    def labels(self) -> list[int | None] | None:
        """Of every picture; None where none has one."""
        column = self.pictures.column("label")
        return None if column.null_count == len(column) else column.to_pylist()

    @property
    def captions(self) -> list[str | None]:
        return self.pictures.column("caption").to_pylist()


def in_any_order(source: ImageSource) -> ImageSource:
    """The same pictures as an `IndexedSource`, where they can be read so; `OnlyInOrder` for shards on this machine that
    cannot."""
    return source.indexed() if isinstance(source, ShardStream) and source.indexed else source


def index_of(
    content: str, num_shards: int, rows: Callable[[int], Iterable[Row]], check: Callable[[int], None]
) -> pa.Table:
    """All `rows` of the shards with this content: from the cache, or found, by threads, and kept there; `check` of
    every shard comes before the rows of any."""
    name = hashlib.sha256(f"{VERSION} {content}".encode()).hexdigest()[:32]
    path = cache_dir() / "shards" / f"{name}.arrow"
    if path.exists():
        return kept_index(path, num_shards)
    with making(path) as beat:
        if path.exists():  # another process has made it meanwhile
            return kept_index(path, num_shards)

        def part(shard: int) -> pa.Table:
            found = list(rows(shard))
            columns = list(zip(*found, strict=True)) if found else [()] * 4
            return pa.table([[shard] * len(found), *map(list, columns)], schema=SCHEMA)

        parts, pool = [], decoding_threads()
        try:
            for _ in pool.map(check, range(num_shards)):
                beat()
            for table in pool.map(part, range(num_shards)):
                beat()
                parts.append(table)
        finally:
            pool.shutdown(cancel_futures=True)
        whole = pa.concat_tables(parts).combine_chunks()
        keep(path, partial(write_table, whole))
    return whole


def write_table(table: pa.Table, file: IO[bytes]) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def kept_index(path: Path, num_shards: int) -> pa.Table:
    """That of a file of the cache; `UserError` for a damaged one."""
    with reading(path, "an index of shards", REMEDY):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        check_buffers(table)
        shards = table.column("shard").to_numpy() if table.schema.equals(SCHEMA) else np.array([-1])
        if (np.diff(shards, prepend=0, append=num_shards) < 0).any():
            raise ValueError(f"not of {num_shards} shards")
    return table
