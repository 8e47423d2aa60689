"""Shards: files of many pictures, on this machine or elsewhere, each read from its beginning to its end.

WebDataset tars, Parquet and Arrow. Nothing is copied and no shard is held in memory; whatever `fsspec` opens can be
named (s3://, gs://, https://, with its package for that place installed). Those of this machine, but for compressed
tars and Parquet in large groups, are also read in any order (`shard_index`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from consonar.data.huggingface import Columns, columns_wanted
from consonar.data.picture_files import ShardStream
from consonar.data.shard_files import file_system, shard_file
from consonar.data.shard_index import IndexedShards, index_of
from consonar.data.tables import Tables, features_of
from consonar.data.tars import Tars
from consonar.errors import MissingSplit, UserError, reading
from consonar.files.readers import home_expanded
from consonar.origin import content_hash

ENDINGS = {"webdataset": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet",), "arrow": (".arrow",)}
"""Of the shards in a folder, by kind."""
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
GLOB = re.compile(r"[*?\[]")
QUERY = re.compile(r"\?(?=[a-z]+=)")
"""What chooses columns; any other question mark is a part of a URL or stands for a character."""
URL_QUERY = re.compile(r"\?(?=(?:image|label|caption)=)")
PIECES, PIECE = 16, 2**16
"""How many pieces of a shard are in the hash of its content, and their bytes."""


def is_pattern(target: str) -> bool:
    """Whether shards are meant, and not a file or folder of this name."""
    place, _ = place_and_columns(target)
    return not home_expanded(place).exists() and bool("://" in place or BRACES.search(place) or GLOB.search(place))


def place_and_columns(target: str) -> tuple[str, dict[str, str]]:
    """What stands before and behind the question mark of `SHARDS?label=NAME`."""
    place, *query = (URL_QUERY if "://" in target else QUERY).split(target, maxsplit=1)
    return place, columns_wanted(query[0]) if query else {}


def open_shards(kind: str, target: str, split: str, image_size: int = 0) -> ShardStream:
    """The pictures of all shards that `target` names, in the order of the words; `image_size` does not matter.

    `train-{0000..1023}.tar`, `{a,b}/*.tar`, a URL, or a folder, whose shards are those with the usual ending. Raises
    `UserError` where none is found, and with its name for one that is missing: of this machine before any is read.
    """
    if split != "train":
        raise MissingSplit(f"split: {kind}:{target} has no splits, so all of it is the train split, not {split!r}")
    place, wanted = place_and_columns(target)
    paths = [path for words in expanded(place) for path in found(words, ENDINGS[kind])]
    local = [Path(path) for path in paths if "://" not in path]
    if missing := [path for path in local if not path.is_file()]:
        more = f" (and {len(missing) - 1} more of {len(paths)})" if len(missing) > 1 else f" (of {len(paths)})"
        raise UserError(f"data: no shard {missing[0]}{more}")
    names, called = below_common(paths), f"{kind}:{place}"
    shards: Tars | Tables = Tars(paths, names, wanted)
    if kind != "webdataset":
        with shard_file(paths[0], kind) as file:
            shards = Tables(kind, paths, names, Columns(features_of(kind, file), called, wanted))
    stream = ShardStream(called, shards.class_names, len(paths), shards.pictures)
    if len(local) < len(paths):
        return stream
    known = [f"{name} {path.stat().st_size} {sorted(wanted.items())}" for name, path in zip(names, local, strict=True)]
    with reading(f"data: {place}", "shards"):
        content = content_hash(known, lambda index: some_bytes(local[index]))

    stream = replace(stream, content_hash=content)

    def indexed() -> IndexedShards:
        with reading(f"data: {place}", "shards"):  # most of their bytes are not in the hash
            written = [path.stat().st_mtime_ns for path in local]
        pictures = index_of(f"{kind} {content} {written}", len(paths), shards.rows, shards.check_any_order)
        return IndexedShards(stream, pictures, shards.picture)

    return replace(stream, indexed=indexed)


def some_bytes(path: Path) -> bytes:
    """Pieces of a file at equal steps, first and last; a file that is no longer than them as a whole."""
    with path.open("rb") as file:
        if (size := path.stat().st_size) <= PIECES * PIECE:
            return file.read()
        found = b""
        for piece in range(PIECES):
            file.seek((size - PIECE) * piece // (PIECES - 1))
            found += file.read(PIECE)
    return found


def expanded(words: str) -> Iterator[str]:
    """`a1`, `a2` <- `a{1..2}`; numbers are as wide as the first one is written."""
    match = BRACES.search(words)
    if match is None:
        yield words
        return
    first, last, listed = match.groups()
    choices = listed.split(",") if listed else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from expanded(words[: match.start()] + choice + words[match.end() :])


def found(words: str, endings: Sequence[str]) -> list[str]:
    """The shards that words without braces name: one itself, or what a folder or a pattern holds, sorted by name."""
    is_local = "://" not in words
    words = str(home_expanded(words)) if is_local else words
    if is_local and Path(words).is_dir():
        paths = [str(path) for path in sorted(Path(words).iterdir()) if path.name.endswith(tuple(endings))]
    elif GLOB.search(words) and not (is_local and Path(words).exists()):
        system, inner = file_system(words)
        paths = [path if is_local else system.unstrip_protocol(path) for path in sorted(system.glob(inner))]
    else:
        return [words]
    if not paths:
        raise UserError(f"data: no shard is called {words!r}; a folder has those ending with {', '.join(endings)}")
    return paths


def below_common(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all are in."""
    parts = [PurePosixPath(path).parts for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]
