"""Where images come from: a table of the kinds of sources, `open_source`, which reads what `--data` names, and sources
made of others: some rows of one, and what becomes of its labels."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from consonar.data.cifar10 import open_cifar10
from consonar.data.huggingface import dataset_splits, open_dataset
from consonar.data.image_folder import ImageFolder, folder_splits
from consonar.data.labels import DROP, class_id, known_labels, places_among, read_class_file
from consonar.data.openmoji import SPLITS, OpenMoji
from consonar.data.picture_files import ShardStream, Unread
from consonar.data.scene_source import open_scenes
from consonar.data.shards import is_pattern, open_shards
from consonar.errors import NotHere, UserError
from consonar.files.readers import home_expanded
from consonar.origin import class_difference, same_text
from consonar.types import ImageRecord, ImageSource, IndexedSource


@dataclass(frozen=True)
class SourceKind:
    """A kind of source. A user writes its name in `SOURCES`, and behind a colon the target, where it has any."""

    open: Callable[[str, str, int], ImageSource]
    """From target (or ""), split and image size; `MissingSplit` for a split that it does not have."""
    targets: tuple[str, ...] = ("",)
    """What a target looks like, for the list of choices; "": it may be left out."""
    splits: Callable[[str], Sequence[str]] = lambda target: ()
    """The names of a target's splits, for which no picture is read; none where all of it is one."""
    mirrors: bool = True
    """Whether a picture may be mirrored, which makes captions of left and right untrue."""
    has_captions: bool = True
    """Whether a picture may have a caption."""
    is_drawn: bool = False
    """Whether images are drawn at the image size; others keep theirs and are cropped when they are used."""


def of_hugging_face(kind: str, *targets: str) -> SourceKind:
    return SourceKind(lambda place, split, _: open_dataset(kind, place, split), targets, partial(dataset_splits, kind))


def open_arrow(target: str, split: str, image_size: int) -> ImageSource:
    """Shards, or a data set on this machine, which can be read in any order."""
    return (
        open_shards("arrow", target, split, image_size) if is_pattern(target) else open_dataset("arrow", target, split)
    )


def arrow_splits(target: str) -> Sequence[str]:
    return () if is_pattern(target) else dataset_splits("arrow", target)


SOURCES: dict[str, SourceKind] = {
    "openmoji": SourceKind(lambda _, split, size: OpenMoji(split, size), splits=lambda _: SPLITS, is_drawn=True),
    "scenes": SourceKind(open_scenes, ("", "COUNT[?seed=N]"), lambda _: SPLITS, mirrors=False, is_drawn=True),
    "imagefolder": SourceKind(
        lambda path, split, _: ImageFolder(path, split), ("PATH",), folder_splits, has_captions=False
    ),
    "cifar10": SourceKind(
        lambda path, split, _: open_cifar10(path, split), ("", "PATH"), lambda _: ("train", "test"), has_captions=False
    ),
    "webdataset": SourceKind(partial(open_shards, "webdataset"), ("SHARDS",)),
    "parquet": SourceKind(partial(open_shards, "parquet"), ("SHARDS",)),
    "arrow": SourceKind(open_arrow, ("PATH", "SHARDS"), arrow_splits),
    "hf": of_hugging_face("hf", "OWNER/NAME[:CONFIG]", "PATH"),
    "hf-stream": of_hugging_face("hf-stream", "..."),
}


def choices() -> str:
    """What can be written, for messages."""
    forms = [f"{name}:{to}".removesuffix(":") for name, kind in SOURCES.items() for to in kind.targets]
    return ", ".join([forms[0], "PATH", *forms[1:]])


def find_source(spec: str) -> tuple[SourceKind, str]:
    """The kind and target that `spec` means; a path that exists is an image folder. `NotHere` for anything else."""
    name, colon, target = spec.partition(":")
    if name in SOURCES and bool(colon) in map(bool, SOURCES[name].targets):
        return SOURCES[name], target
    if home_expanded(spec).exists():
        return SOURCES["imagefolder"], spec
    raise NotHere(f"data: {spec!r} is neither a folder nor a known source; choices: {choices()}")


def named_after(place: str) -> str:
    """The source that a folder at `place` is called after, as tokens/scenes is; "..." for none."""
    own = [name for name, kind in SOURCES.items() if "" in kind.targets and Path(place).name.startswith(name)]
    return own[0] if own else "..."


def check_mirrored(spec: str, key: str, value: object) -> None:
    """Raises `UserError` for images that `key` with this value would mirror, and that must not be."""
    if not find_source(spec)[0].mirrors:
        raise UserError(f"{key}: {value!r} mirrors pictures, and the captions of {spec} tell left from right")


def check_captioned(spec: str) -> None:
    """Raises `UserError` for images of a kind that has no captions."""
    if not find_source(spec)[0].has_captions:
        kinds = ", ".join(name for name, kind in SOURCES.items() if kind.has_captions)
        raise UserError(
            f"--captions: no picture of {spec!r} has one; leave --captions and --text-encoder away, or take {kinds}"
        )


def at_size(spec: str) -> tuple[str, int | None]:
    """Source and size that NAME-PIXELS of a drawn source means (`openmoji-64`); any other spec itself, and None."""
    name, _, size = spec.rpartition("-")
    if name in SOURCES and SOURCES[name].is_drawn and size.isdecimal() and len(size) < 6:
        return name, int(size)
    return spec, None


def open_source(
    spec: str,
    *,
    split: str = "train",
    image_size: int,
    classes: str | None = None,
    label_default: str | None = None,
    model_classes: Sequence[str] | None = None,
) -> ImageSource:
    """The images that `spec` names.

    * `openmoji`: the emoji of the OpenMoji package, drawn at `image_size` pixels (the only use of `image_size`: images
      of other sources keep their size and are cropped when they are used).
    * `scenes`, `scenes:COUNT[?seed=N]`: arranged emoji with captions, drawn likewise; see `data.scene_source`.
    * `cifar10`, `cifar10:PATH`: CIFAR-10, see `data.cifar10`.
    * `PATH`, `imagefolder:PATH`: a folder of image files, see `ImageFolder`.
    * `hf:OWNER/NAME[:CONFIG]`, `hf:PATH`, `arrow:PATH`: a Hugging Face data set of the hub, or of this machine (saved
      with `save_to_disk`, an .arrow file, or a folder that `load_dataset` reads); `hf-stream:` instead of `hf:` reads
      it while it is used, without keeping it.
    * `webdataset:SHARDS`, `parquet:SHARDS`, `arrow:SHARDS`: files here or elsewhere, see `data.shards`.

    `?image=NAME&label=NAME&caption=NAME` behind a data set or shards chooses columns.

    `split` is "train", "validation" (test, where nothing is called so) or the name of a split. `classes` is a file
    that names
    class 0, 1, ... (`labels.read_class_file`), `label_default` what becomes of pictures without a label
    (`relabelled`), by a name of `model_classes` where the images have none. Raises `UserError` for an unknown
    `spec` or `split`, and for a folder or data set that is missing, empty or ambiguous.
    """
    kind, target = find_source(spec)
    return labelled(kind.open(target, split, image_size), classes, label_default, model_classes)


def labelled(
    source: ImageSource,
    classes: str | None = None,
    label_default: str | None = None,
    model_classes: Sequence[str] | None = None,
) -> ImageSource:
    """The source with the labels that `open_source` gives it."""
    return relabelled(source, None if classes is None else read_class_file(classes), label_default, model_classes)


@dataclass(eq=False)
class Part:
    """Some rows of an `IndexedSource`, one itself, called `name`; `relabel` gives its labels of `class_names`."""

    source: IndexedSource
    rows: Sequence[int]
    name: str
    relabel: Callable[[int | None], int | None] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.class_names = self.class_names if self.relabel else self.source.class_names
        self.keeps_pictures: bool = getattr(self.source, "keeps_pictures", False)
        if (labels := known_labels(self.source)) is not None:
            self.labels = [self.relabel(labels[row]) if self.relabel else labels[row] for row in self.rows]

    @cached_property
    def content_hash(self) -> str | None:
        """Of the source's content and the rows (relabelled: the source's alone); None where the source has none."""
        content: str | None = getattr(self.source, "content_hash", None)
        if self.relabel or content is None:
            return content
        return hashlib.sha256(f"{content} {self.rows}".encode()).hexdigest()

    @property
    def captions(self) -> list[str | None] | None:
        """Of its rows; None where the source does not know them before it is read."""
        known = getattr(self.source, "captions", None)
        return None if known is None else [known[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> ImageRecord:
        """Picture `index` of the part."""
        record = self.source.read(self.rows[index])
        return replace(record, label=self.relabel(record.label)) if self.relabel else record

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))


def called_in(source: ImageSource, index: int) -> str:
    """Which row of all the data a picture of a source, or of a part of it, is, in words."""
    while isinstance(source, Part):
        index, source = source.rows[index], source.source
    return f"row {index:,} of the data, counted from 0"


@dataclass
class Stream:
    """A source whose pictures `walk` gives, anew each time."""

    name: str
    class_names: tuple[str, ...] | None
    walk: Callable[[], Iterator[ImageRecord]]

    def __iter__(self) -> Iterator[ImageRecord]:
        return self.walk()


def relabelled(
    source: ImageSource,
    class_names: tuple[str, ...] | None,
    default: str | None = None,
    names: Sequence[str] | None = None,
) -> ImageSource:
    """The source with labels that count the classes `class_names`, and with `default` for pictures without one.

    `class_names` None leaves them as they are. `default` is the id or name of a class, `drop` (such pictures are left
    out), or None; where the source names no classes, the default is one of `names`. Raises `UserError` for a class of
    the source that is not among `class_names`, and an unknown default.
    """
    if class_names is None and default is None:
        return source
    own, order = source.class_names, None
    if own is not None and class_names is not None:
        order = places_among(class_names, own, f"--classes: class of {source.name}")
    given = class_names or own
    missing = None if default is None or default == DROP else class_id(default, given or names)

    def relabel(label: int | None) -> int | None:
        if label is None:
            return missing
        return order[label] if order and 0 <= label < len(order) else label

    def moved(record: ImageRecord) -> ImageRecord:
        return replace(record, label=relabel(record.label))

    if isinstance(source, ShardStream):
        return replace(
            source, class_names=given, shard=partial(moved_shard, source, relabel, default == DROP), indexed=None
        )
    if not isinstance(source, IndexedSource):
        kept = partial(filter, lambda record: default != DROP or record.label is not None)
        # No generator: these go on behind a picture that could not be read.
        return Stream(source.name, given, lambda: kept(map(moved, source)))
    known = known_labels(source) if default == DROP else None
    rows = [row for row in range(len(source)) if known is None or known[row] is not None]
    return Part(source, rows, source.name, relabel, given)


def moved_shard(
    source: ShardStream, relabel: Callable[[int | None], int | None], drops: bool, index: int
) -> Iterator[Unread]:
    """The pictures of a shard with other labels; with `drops` only those that have one."""

    def read(unread: Unread) -> ImageRecord:
        record = unread.read()
        return replace(record, label=relabel(record.label))

    for unread in source.shard(index):
        if not (drops and unread.label is None):
            yield Unread(relabel(unread.label), partial(read, unread))


def in_order_of(source: ImageSource, class_names: tuple[str, ...] | None, other: str) -> ImageSource | str:
    """The source with labels that count `class_names`, where it has no other classes; else in words which differs
    first from those of `other`."""
    given = source.class_names
    if class_names and given and set(map(same_text, given)) <= set(map(same_text, class_names)):
        return relabelled(source, class_names)
    return class_difference(given, class_names, other) or source
