"""Shards: files of many pictures, on this machine or elsewhere, each read from its beginning to its end.

WebDataset tars, Parquet and Arrow. Nothing is copied and no shard is held in memory; whatever `fsspec` opens can be
named (s3://, gs://, https://, with its package for that place installed).
"""

import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from consonar.data.huggingface import CAPTION_NAMES, LABEL_NAMES, Columns, caption_of, columns_wanted
from consonar.data.picture_files import IMAGE_ENDINGS, MAX_BYTES, ShardStream, Unread, read_image
from consonar.errors import BadImage, MissingSplit, UserError, reading
from consonar.files.readers import home_expanded, parse_json
from consonar.json_types import Json
from consonar.origin import content_hash
from consonar.types import ImageRecord

ENDINGS = {"webdataset": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet",), "arrow": (".arrow",)}
"""Of the shards in a folder, by kind."""
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
GLOB = re.compile(r"[*?\[]")
QUERY = re.compile(r"\?(?=[a-z]+=)")
"""What chooses columns; any other question mark is a part of a URL or stands for a character."""
URL_QUERY = re.compile(r"\?(?=(?:image|label|caption)=)")
ROWS_PER_BATCH = 64
PIECES, PIECE = 16, 2**16
"""How many pieces of a shard are in the hash of its content, and their bytes."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


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
    names = below_common(paths)
    content = None
    if len(local) == len(paths):
        known = [
            f"{name} {path.stat().st_size} {sorted(wanted.items())}" for name, path in zip(names, local, strict=True)
        ]
        with reading(f"data: {place}", "shards"):
            content = content_hash(known, lambda index: some_bytes(local[index]))
    if kind == "webdataset":
        classes, rows = None, partial(tar_pictures, wanted)
    else:
        with shard_file(paths[0], kind) as file:
            columns = Columns(features_of(kind, file), f"{kind}:{place}", wanted)
        classes, rows = columns.class_names, partial(table_pictures, kind, columns)
    return ShardStream(f"{kind}:{place}", classes, len(paths), lambda index: rows(paths[index], names[index]), content)


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


def file_system(url: str) -> tuple[Any, str]:
    """Of fsspec, and the path in it; `UserError` where its package is missing."""
    import fsspec  # type: ignore[import-untyped]

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no such protocol, or a package for it
        raise UserError(f"data: {url}: {error}") from error
    return system, path


def below_common(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all are in."""
    parts = [PurePosixPath(path).parts for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


@contextmanager
def shard_file(path: str, kind: str) -> Iterator[IO[bytes]]:
    """A shard, open; what reading it raises becomes a `UserError` that begins with its name."""
    system, inner = file_system(path)
    with reading(path, f"a shard ({kind})"):
        try:
            file = system.open(inner, "rb")
        except FileNotFoundError as error:
            raise UserError(f"data: no shard {path}") from error
        with file:
            yield file


def features_of(kind: str, file: IO[bytes]) -> Any:
    """The column types, as `datasets` knows them."""
    from datasets import Features
    from pyarrow import parquet

    return Features.from_arrow_schema(parquet.read_schema(file) if kind == "parquet" else arrow_reader(file).schema)


def arrow_reader(file: IO[bytes]) -> Any:
    """Batches of an Arrow file of either format."""
    import pyarrow as pa

    if file.read(6) == b"ARROW1":
        return pa.ipc.open_file(file)
    file.seek(-len(END_OF_STREAM), 2)
    if file.read() != END_OF_STREAM:  # which Arrow takes for a shorter one where the cut is between two batches
        raise ValueError("no end of the stream")
    file.seek(0)
    return pa.ipc.open_stream(file)


def table_pictures(kind: str, columns: Columns, path: str, name: str) -> Iterator[Unread]:
    """The rows of a Parquet or Arrow file."""
    from pyarrow import parquet

    with shard_file(path, kind) as file:
        if kind == "parquet":
            batches = parquet.ParquetFile(file).iter_batches(ROWS_PER_BATCH, columns=columns.kept)
        else:
            reader = arrow_reader(file)
            count = getattr(reader, "num_record_batches", None)
            batches = reader if count is None else map(reader.get_batch, range(count))
        number = itertools.count()
        for batch in batches:
            kept = batch.select(columns.kept)
            kept.validate(full=True)  # Arrow follows damaged offsets anywhere
            for row in kept.to_pylist():
                yield columns.unread(row, f"{name}/{next(number)}")


def tar_pictures(wanted: dict[str, str], path: str, name: str) -> Iterator[Unread]:
    """The samples of a WebDataset tar: files that follow each other and share their name up to its first dot."""
    with shard_file(path, "webdataset") as file, tarfile.open(fileobj=file) as tar:
        for key, members in itertools.groupby(tar_files(tar), lambda member: member[0]):
            yield sample_picture({ending: data for _, ending, data in members}, wanted, f"{name}/{key}")


def tar_files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Key, ending and content of every file that may matter; an archive without its end is damaged."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        folder, _, file_name = member.name.rpartition("/")
        stem, _, ending = file_name.partition(".")
        kind = f".{ending.lower().rpartition('.')[2]}"
        if not (member.isreg() and stem and kind in (*IMAGE_ENDINGS, ".cls", ".txt", ".json")):
            continue
        if member.size > MAX_BYTES:
            raise UserError(f"{member.name}: has {member.size} bytes; a picture has at most {MAX_BYTES}")
        content = tar.extractfile(member)
        yield f"{folder}/{stem}".lstrip("./"), ending.lower(), content.read() if content else b""
    # Silently the module takes a shard that was cut between two files, or damaged at a header, for the whole.
    assert tar.fileobj is not None  # it is open
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")


def sample_picture(sample: dict[str, bytes], wanted: dict[str, str], name: str) -> Unread:
    """The picture of a sample, with the label and caption of its .cls, .txt or .json."""
    images = [ending for ending in sample if f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS]
    image = wanted.get("image", images[0] if len(images) == 1 else "")
    if len(images) > 1 and image not in images:
        raise UserError(f"{name}: several pictures: {', '.join(images)}; add ?image=ENDING to the data's name")
    told: Json = {}
    if "json" in sample:
        with reading(f"{name}.json", "a table of JSON"):
            told = dict(parse_json(sample["json"]))
    told |= {ending: sample[ending].decode(errors="replace").strip() for ending in ("cls", "txt") if ending in sample}

    def value(key: str, names: Sequence[str]) -> object:
        return next((told[word] for word in ([wanted[key]] if key in wanted else names) if word in told), None)

    label, told_caption = value("label", ("cls", *LABEL_NAMES)), value("caption", ("txt", *CAPTION_NAMES))
    # Of the lines of a .txt each is a caption.
    caption = told_caption if told_caption is told.get("txt") else caption_of(told_caption)
    if not (label is None or re.fullmatch(r"-1|\d{1,18}", str(label))):
        raise UserError(f"{name}: label {label!r} is no number; add ?label= to the data's name for none")
    known = None if label is None or int(str(label)) == -1 else int(str(label))

    def read() -> ImageRecord:
        if image not in sample:
            raise BadImage(f"{name}: no picture{f' .{image}' if image else ''} beside {', '.join(sample)}")
        return ImageRecord(read_image(sample[image], name), name, known, caption)

    return Unread(known, read)
