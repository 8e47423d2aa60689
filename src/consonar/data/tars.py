"""Samples of WebDataset tars: files that follow each other and share their name up to its first dot."""

import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consonar.data.huggingface import CAPTION_NAMES, LABEL_NAMES, caption_of
from consonar.data.picture_files import IMAGE_ENDINGS, MAX_BYTES, Row, Unread, read_image
from consonar.data.shard_files import shard_file
from consonar.errors import BadImage, OnlyInOrder, UserError, reading
from consonar.files.readers import parse_json
from consonar.json_types import Json
from consonar.types import ImageRecord

KIND = "webdataset"
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")
"""First bytes of tars that gzip, bzip2 and xz have compressed, whatever they are called."""
MAGIC = slice(257, 262)
"""Where a tar says "ustar"; its first bytes are the name of a file, any."""


class Member(NamedTuple):
    """A file of a tar that may matter."""

    key: str
    """Of its sample."""
    ending: str
    content: bytes
    start: int
    """Where its header begins, and `stop` where the next one does."""
    stop: int


@dataclass(frozen=True)
class Tars:
    """Tars at `paths`, called `names`; `wanted` chooses what of a sample is read."""

    paths: Sequence[str]
    names: Sequence[str]
    wanted: dict[str, str]
    class_names: tuple[str, ...] | None = None

    def pictures(self, shard: int) -> Iterator[Unread]:
        """All samples of a tar."""
        with shard_file(self.paths[shard], KIND) as file, tarfile.open(fileobj=file) as tar:
            yield from self.samples(shard, tar)

    def samples(self, shard: int, tar: tarfile.TarFile) -> Iterator[Unread]:
        for key, members in itertools.groupby(tar_members(tar), lambda member: member.key):
            contents = {member.ending: member.content for member in members}
            yield sample_picture(contents, self.wanted, f"{self.names[shard]}/{key}")

    def check_any_order(self, shard: int) -> None:
        """Raises `OnlyInOrder` for a compressed tar."""
        with shard_file(self.paths[shard], KIND) as file:
            first = file.read(tarfile.BLOCKSIZE)
        if first.startswith(PACKED) and first[MAGIC] != b"ustar":
            raise OnlyInOrder(f"data: {self.paths[shard]}: compressed, and read from its beginning alone; unpack it")

    def rows(self, shard: int) -> Iterator[Row]:
        """First and last byte of every sample, and what is said of it; no picture is read."""
        with shard_file(self.paths[shard], KIND) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, grouped in itertools.groupby(tar_members(tar, pictures=False), lambda member: member.key):
                members = list(grouped)
                contents = {member.ending: member.content for member in members}
                told = sample_picture(contents, self.wanted, f"{self.names[shard]}/{key}")
                yield Row(members[0].start, members[-1].stop, told.label, told.caption)

    def picture(self, shard: int, number: int, start: int, stop: int) -> Unread:
        """The sample at these bytes, which is not called by its number."""
        with shard_file(self.paths[shard], KIND) as file:
            file.seek(start)
            alone = io.BytesIO(file.read(stop - start) + bytes(2 * tarfile.BLOCKSIZE))
            with tarfile.open(fileobj=alone, mode="r:") as tar:
                (found,) = self.samples(shard, tar)
        return found


def tar_members(tar: tarfile.TarFile, pictures: bool = True) -> Iterator[Member]:
    """Every file that may matter, those with `pictures` empty unless they are wanted; an archive without its end is
    damaged."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        folder, _, file_name = member.name.rpartition("/")
        stem, _, ending = file_name.partition(".")
        kind = f".{ending.lower().rpartition('.')[2]}"
        if not (member.isreg() and stem and kind in (*IMAGE_ENDINGS, ".cls", ".txt", ".json")):
            continue
        if member.size > MAX_BYTES:
            raise UserError(f"{member.name}: has {member.size} bytes; a picture has at most {MAX_BYTES}")
        file = tar.extractfile(member) if pictures or kind not in IMAGE_ENDINGS else None
        key, content = f"{folder}/{stem}".lstrip("./"), file.read() if file else b""
        yield Member(key, ending.lower(), content, member.offset, tar.offset)
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

    return Unread(known, read, caption)
