"""Data sets of Hugging Face, of the hub or of this machine, as image sources."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any
from urllib.parse import parse_qsl

from consonar.data.captions import in_lines
from consonar.data.image_folder import choose_split, label_of
from consonar.data.picture_files import ShardStream, Unread, read_image
from consonar.data.store_format import check_buffers
from consonar.errors import BadImage, MissingSplit, UserError, check_choice, reading
from consonar.files.readers import home_expanded, parse_json
from consonar.json_types import JsonMap
from consonar.origin import check_distinct, content_hash
from consonar.types import ImageRecord, ImageSource

CAPTION_NAMES = ("caption", "captions", "text", "prompt")
LABEL_NAMES = ("label", "labels", "class", "class_id", "cls")
ENCODED = {"bytes", "path"}
"""The fields of a picture in a table that does not say that it is one."""
WEBDATASET_NAMES = ("__key__", "__url__")


def _pick_column(kind: str, candidates: list[str], preferred: tuple[str, ...], wanted: str | None) -> str | None:
    """The column of one kind: the one asked for, the only one, or the only one with a usual name."""
    if wanted is not None:
        if wanted and wanted not in candidates:
            raise UserError(f"data: no {kind} column {wanted!r}; choices: {', '.join(candidates) or 'none'}")
        return wanted or None
    usual = candidates if len(candidates) == 1 else [name for name in candidates if name in preferred]
    if candidates and len(usual) != 1:
        hint = f"add ?{kind}=NAME to the data's name (?{kind}= for none)"
        raise UserError(f"data: several {kind} columns: {', '.join(candidates)}; {hint}")
    return usual[0] if usual else None


def caption_of(told: object) -> str | None:
    """The captions that an entry of a table holds, one a line: a text is one, a list several."""
    texts = [one for one in (told if isinstance(told, list) else [told]) if one is not None]
    return in_lines(map(str, texts)) if texts else None


class Columns:
    """Which columns of a table hold the pictures, labels and captions, by their types.

    The image column is the one of type Image, or where there is none one of encoded bytes; the label column the one of
    type ClassLabel, else an integer column named label, labels, class, class_id or cls; the caption column is the
    column of strings, or of lists of them, several captions. Where several qualify, the usual name (caption, text,
    prompt) decides, else `UserError` lists them; `wanted` = {"image" | "label" | "caption": name} chooses by hand, with
    an empty name for none. Label -1 means "unknown" in Hugging Face data sets and becomes None.
    """

    def __init__(self, features: Any, name: str, wanted: dict[str, str]) -> None:
        from datasets import ClassLabel, Value
        from datasets import Image as ImageFeature

        def is_text(feature: object) -> bool:
            return isinstance(feature, Value) and feature.dtype in ("string", "large_string")

        if features is None:
            raise UserError(f"data: the column types of {name!r} are unknown when streamed; use hf: instead")
        plain = {c: feature.dtype for c, feature in features.items() if isinstance(feature, Value)}
        images = [c for c, feature in features.items() if isinstance(feature, ImageFeature)]
        if not images:
            images = [c for c, feature in features.items() if isinstance(feature, dict) and {*feature} == ENCODED]
            images += [c for c, dtype in plain.items() if dtype in ("binary", "large_binary")]
        labels = [c for c, feature in features.items() if isinstance(feature, ClassLabel)]
        texts = [c for c, feature in features.items() if is_text(feature)]
        lists = [c for c, feature in features.items() if is_text(getattr(feature, "feature", None))]
        texts += [c for c in lists if not texts or c in CAPTION_NAMES or c == wanted.get("caption")]  # else tags
        unasked = {*LABEL_NAMES, *WEBDATASET_NAMES} - {wanted.get("caption")}
        captions = [c for c in texts if c not in unasked]
        if "label" in wanted or not labels:
            integers = [c for c, dtype in plain.items() if dtype.lstrip("u").startswith("int")]
            labels += [c for c in integers if c in LABEL_NAMES or c == wanted.get("label")]
        if "label" not in wanted and not labels and (other := next((c for c in LABEL_NAMES if c in features), None)):
            raise UserError(
                f"data: column {other!r} of {name!r} is {plain.get(other, 'no number')}, and labels are ClassLabel or "
                "integers: convert it (`class_encode_column` of datasets), or add ?label= to the data's name for none"
            )
        image = _pick_column("image", images, (), wanted.get("image"))
        if image is None:
            raise UserError(f"data: no image column in {name!r}; its columns: {', '.join(features)}")
        self.image = image
        self.label = _pick_column("label", labels, (), wanted.get("label"))
        self.caption = _pick_column("caption", captions, CAPTION_NAMES, wanted.get("caption"))
        label_feature = features[self.label] if self.label else None
        self.class_names = tuple(label_feature.names) if isinstance(label_feature, ClassLabel) else None
        check_distinct(self.class_names, f"data: {name}")
        self.names = tuple(features)
        self.kept = [c for c in (self.image, self.label, self.caption) if c]

    def label_of(self, row: JsonMap) -> int | None:
        label: int | None = row[self.label] if self.label else None
        return None if label == -1 else label

    def caption_in(self, row: JsonMap) -> str | None:
        return caption_of(row[self.caption]) if self.caption else None

    def record(self, row: JsonMap, name: str) -> ImageRecord:
        """The picture of a row, decoded."""
        encoded = row[self.image]
        if encoded is None:
            raise BadImage(f"{name}: no image in column {self.image!r}")
        data = encoded
        if isinstance(encoded, dict):
            data = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
        if isinstance(data, str) and "://" in data:  # a remote file, maybe inside an archive
            import fsspec  # type: ignore[import-untyped]

            with reading(name, "a picture elsewhere", kind=BadImage), fsspec.open(data, "rb") as file:
                data = file.read()
        return ImageRecord(read_image(data, name), name, self.label_of(row), self.caption_in(row))

    def unread(self, row: JsonMap, name: str) -> Unread:
        """The picture of a row, not decoded."""
        return Unread(self.label_of(row), partial(self.record, row, name))


def undecoded(dataset: Any, columns: Columns) -> Any:
    """A data set of these columns; decode=False: `read_image` names a damaged picture and keeps no file open."""
    from datasets import Image as ImageFeature

    return dataset.select_columns(columns.kept).cast_column(columns.image, ImageFeature(decode=False))


def streamed(dataset: Any, name: str, wanted: dict[str, str]) -> ShardStream:
    """A `datasets.IterableDataset`, in the shards that it has."""
    columns = Columns(dataset.features, name, wanted)
    dataset, count = undecoded(dataset, columns), dataset.num_shards

    def shard(index: int) -> Iterator[Unread]:
        with reading(f"{name}, shard {index}", "a stream of Hugging Face datasets"):
            for number, row in enumerate(dataset.shard(num_shards=count, index=index)):
                yield columns.unread(row, f"{name}/{number}" if count == 1 else f"{name}/{index}/{number}")

    return ShardStream(name, columns.class_names, count, shard)


class DatasetImages:
    """A Hugging Face `datasets.Dataset` on disk, an `IndexedSource`; see `Columns`."""

    def __init__(self, dataset: Any, name: str, wanted: dict[str, str]) -> None:
        self.name, self.columns = name, Columns(dataset.features, name, wanted)
        self.class_names = self.columns.class_names
        self.dataset = undecoded(dataset, self.columns)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))  # unlike a generator it goes on behind a bad picture

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels(self) -> Sequence[int | None] | None:
        """The class of every row; None without a label column."""
        if self.columns.label is None:
            return None
        with reading(self.name, "a data set"):
            return [None if label == -1 else label for label in self.dataset.with_format(None)[self.columns.label]]

    @property
    def captions(self) -> list[str | None]:
        """Of every row. `UserError` where no column has them."""
        if (column := self.columns.caption) is None:
            raise UserError(f"data: no caption column in {self.name!r}; its columns: {', '.join(self.columns.names)}")
        with reading(self.name, "a data set"):
            return [caption_of(told) for told in self.dataset.with_format(None)[column]]

    @cached_property
    def content_hash(self) -> str:
        """`origin.content_hash` of the rows, the same wherever they lie."""

        def encoded(index: int) -> bytes:
            picture = self.dataset[index][self.columns.image] or {}
            return picture.get("bytes") or str(picture.get("path")).encode()

        with reading(self.name, "a data set"):
            rows = [f"{index} {label}" for index, label in enumerate(self.labels or [None] * len(self))]
            return content_hash(rows, encoded)

    def read(self, index: int) -> ImageRecord:
        """Row `index`, decoded."""
        with reading(self.name, "a data set"):
            row = self.dataset[index]
        return self.columns.record(row, f"{self.name}/{index}")


def columns_wanted(query: str) -> dict[str, str]:
    """{"label": "fine"} <- "label=fine"; `UserError` for other kinds of columns, and for one that is given twice."""
    columns: dict[str, str] = {}
    for key, name in parse_qsl(query, keep_blank_values=True):
        check_choice("data: column kind", key, ("image", "label", "caption"))
        if key in columns:
            raise UserError(f"data: ?{query}: {key} is given twice; keep one")
        columns[key] = name
    return columns


@contextmanager
def without_cards() -> Iterator[None]:
    """Around what looks for the card of a data set: that a README.md beside the files is none is not said."""
    logger = logging.getLogger("huggingface_hub.repocard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def dataset_splits(kind: str, target: str) -> list[str]:
    """The names of the splits of a data set (see `open_dataset`), for which none of its pictures is read; none where
    all of it is one."""
    import datasets

    place = target.partition("?")[0]
    path = home_expanded(place)
    if kind == "arrow" and not path.exists():
        raise UserError(f"data: no file or folder {str(path)!r}")
    if path.is_file() or (path / "state.json").is_file():
        return []
    with reading(f"data: '{kind}:{target}'", "a Hugging Face data set"), without_cards():
        if (path / "dataset_dict.json").is_file():
            return list(parse_json((path / "dataset_dict.json").read_bytes())["splits"])
        return list(datasets.get_dataset_split_names(*repository(place)))


def repository(place: str) -> tuple[str, str | None]:
    """The folder, or the name on the hub and the configuration, that a path or NAME[:CONFIG] means."""
    path = home_expanded(place)
    if path.is_dir():
        return str(path.resolve()), None
    name, _, config = place.partition(":")
    return name, config or None


def open_dataset(kind: str, target: str, split: str, name: str | None = None) -> ImageSource:
    """A data set through `datasets`: `target` is a path or name[:config], then ?columns.

    `kind` "arrow" is on this machine, "hf" there or on the hub, and "hf-stream" is read while it is used. `name`: what
    it is called; None: as written.
    """
    import datasets

    place, _, query = target.partition("?")
    columns = columns_wanted(query)
    splits, path, chosen = dataset_splits(kind, target), home_expanded(place), None
    if splits:
        chosen = choose_split(split, splits, place)  # before the pictures are read, which may take minutes
    elif split != "train":
        raise MissingSplit(f"split: {place!r} has no splits, so all of it is the train split, not {split!r}")
    with reading(f"data: '{kind}:{target}'", "a Hugging Face data set"), without_cards():
        if path.is_file():
            loaded: Any = datasets.Dataset.from_file(str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if chosen is None else loaded[chosen]
        else:
            loaded = datasets.load_dataset(*repository(place), split=chosen, streaming=kind == "hf-stream")
        called = f"{name or f'{kind}:{place}'}[{label_of(split, chosen or split)}]"
        if isinstance(loaded, datasets.IterableDataset):
            return streamed(loaded, called, columns)
        check_buffers(loaded.data.table)
        return DatasetImages(loaded, called, columns)
