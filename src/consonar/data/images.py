"""Where images come from: OpenMoji, a folder, or a Hugging Face data set, all as an `ImageSource`.

`open_source` turns the text that a user writes (`--data ...`) into a source. Every image is decoded completely and
converted to RGB (`picture_files.read_image`) when it is read; one that is no image or is cut short stops with its name.
"""

from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qsl

from consonar.data.picture_files import IMAGE_ENDINGS, PictureFiles, find_pictures, read_image, sub_folders
from consonar.data.store_format import check_buffers
from consonar.errors import BadImage, MissingSplit, UserError, printable, reading, unknown
from consonar.types import ImageRecord, ImageSource

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""The splits that can be asked for, and the names under which folders and data sets hold them."""

SPECS = ("openmoji", "PATH", "imagefolder:PATH", "arrow:PATH", "hf:OWNER/NAME[:CONFIG]", "hf:PATH", "hf-stream:...")
CAPTION_NAMES = ("caption", "captions", "text", "prompt")
LABEL_NAMES = ("label", "labels", "class", "class_id")


@runtime_checkable
class IndexedSource(ImageSource, Protocol):
    """A source whose images can be read in any order and from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> ImageRecord:
        """Decode image `index`, 0 <= index < len(self)."""
        ...


def _choose_split(split: str, available: list[str], where: str) -> str:
    """The name among `available` that stands for `split`."""
    found = [name for name in SPLIT_NAMES.get(split, (split,)) if name in available]
    if not found:
        raise MissingSplit(f"split: {where} has no {split!r}; choices: {', '.join(available)}")
    return found[0]


class ImageFolder:
    """Images in a folder: the first level of sub-folders are classes, sorted by name; a flat folder has no labels.

    Implements `IndexedSource`. Classes may hold further folders. A folder with `train` and/or `validation` (`val`,
    `valid`), `test` sub-folders is a split one; its classes are those of all splits together, so that label 3 means the
    same everywhere. Raises `UserError` for a missing or empty folder, an empty class, images beside class folders, and
    split folders beside other folders (is `train` a split or a class?).
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise UserError(f"data: no folder {str(root)!r}" + (" (it is a file)" if root.exists() else ""))
        folder, class_folders = self._layout(root, split)
        self.root = root
        self.name = f"imagefolder:{root.resolve()}[{split}]"
        self.class_names = tuple(sorted({printable(path.name) for path in class_folders})) or None
        self.found: PictureFiles = find_pictures(folder)
        self.files = self.found.files
        if not self.files:
            hint = "a data set saved by Hugging Face datasets is opened with arrow:PATH"
            beside = f" beside {self.found.note}" if self.found.note else ""
            endings = ", ".join(IMAGE_ENDINGS)
            raise UserError(f"data: no image in {str(folder)!r}{beside}; looked for {endings} ({hint})")
        self.labels = None if self.class_names is None else self._label_files(folder, self.class_names)

    @staticmethod
    def _layout(root: Path, split: str) -> tuple[Path, list[Path]]:
        """The folder that holds the wanted split, and the class folders of all splits."""
        children = sub_folders(root)
        split_names = {name for names in SPLIT_NAMES.values() for name in names}
        splits = [path for path in children if path.name in split_names]
        if not any(path.name != "test" for path in splits):
            if split != "train":
                raise MissingSplit(f"split: {str(root)!r} has no folder {split!r}, so all of it is the train split")
            return root, children
        others = [path.name for path in children if path not in splits and find_pictures(path).files]
        if others:
            hint = f"{others[0]!r} stands beside it; give the folder of the split, or rename the class"
            raise UserError(f"data: cannot tell whether {str(splits[0])!r} is a split or a class, for {hint}")
        chosen = root / _choose_split(split, [path.name for path in splits], str(root))
        return chosen, [path for folder in splits for path in sub_folders(folder)]

    def _label_files(self, folder: Path, class_names: tuple[str, ...]) -> tuple[int, ...]:
        """The class index of every file: its first folder below `folder`."""
        parents = [path.relative_to(folder).parts[:-1] for path in self.files]
        stray = next((path for path, parts in zip(self.files, parents, strict=True) if not parts), None)
        if stray is not None:
            raise UserError(f"data: image {str(stray)!r} lies beside class folders; move it into one of them")
        filled = {parts[0] for parts in parents}
        empty = [path.name for path in sub_folders(folder) if path.name not in filled]
        if empty:
            raise UserError(f"data: class folder {str(folder / empty[0])!r} holds no image file; remove it or fill it")
        index = {name: label for label, name in enumerate(class_names)}
        return tuple(index[printable(parts[0])] for parts in parents)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> ImageRecord:
        """Image `index` in the order of the paths, decoded; its name is the path below the root."""
        path = self.files[index]
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(read_image(path, str(path)), printable(path.relative_to(self.root).as_posix()), label)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))


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


class DatasetImages:
    """A Hugging Face `datasets.Dataset`: columns are found by type.

    The image column is the one of type Image; the label column the one of type ClassLabel, else an integer column named
    label, labels, class or class_id; the caption column is the string column. Where several qualify, the usual name
    (caption, text, prompt) decides, else `UserError` lists them; `columns` = {"image" | "label" | "caption": name}
    chooses by hand, with an empty name for none. Label -1 means "unknown" in Hugging Face data sets and becomes None.
    """

    def __init__(self, dataset: Any, name: str, columns: dict[str, str]) -> None:
        from datasets import ClassLabel, Value
        from datasets import Image as ImageFeature

        self.name = name
        features = dataset.features
        if features is None:
            raise UserError(f"data: the column types of {name!r} are unknown when streamed; use hf: instead")
        images = [c for c, feature in features.items() if isinstance(feature, ImageFeature)]
        labels = [c for c, feature in features.items() if isinstance(feature, ClassLabel)]
        plain = {c: feature.dtype for c, feature in features.items() if isinstance(feature, Value)}
        captions = [c for c, dtype in plain.items() if dtype in ("string", "large_string")]
        if "label" in columns or not labels:
            integers = [c for c, dtype in plain.items() if dtype.lstrip("u").startswith("int")]
            labels += [c for c in integers if c in LABEL_NAMES or c == columns.get("label")]
        image = _pick_column("image", images, (), columns.get("image"))
        if image is None:
            raise UserError(f"data: no image column in {name!r}; its columns: {', '.join(features)}")
        self.image_column = image
        self.label_column = _pick_column("label", labels, (), columns.get("label"))
        self.caption_column = _pick_column("caption", captions, CAPTION_NAMES, columns.get("caption"))
        label_feature = features[self.label_column] if self.label_column else None
        self.class_names = tuple(label_feature.names) if isinstance(label_feature, ClassLabel) else None
        kept = [c for c in (self.image_column, self.label_column, self.caption_column) if c]
        # decode=False: the bytes are decoded by read_image, which names a damaged picture and keeps no file open.
        self.dataset = dataset.select_columns(kept).cast_column(image, ImageFeature(decode=False))

    def _record(self, index: int, row: dict[str, Any]) -> ImageRecord:
        name = f"{self.name}/{index}"
        encoded = row[self.image_column]
        if encoded is None:
            raise BadImage(f"{name}: no image in column {self.image_column!r}")
        data = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
        if isinstance(data, str) and "://" in data:  # a remote file, maybe inside an archive
            import fsspec  # type: ignore[import-untyped]

            with reading(name, "a picture elsewhere", kind=BadImage), fsspec.open(data, "rb") as file:
                data = file.read()
        label = row[self.label_column] if self.label_column else None
        caption = row[self.caption_column] if self.caption_column else None
        return ImageRecord(read_image(data, name), name, None if label == -1 else label, caption)

    def __iter__(self) -> Iterator[ImageRecord]:
        return starmap(self._record, enumerate(self.dataset))  # unlike a generator it goes on behind a bad picture


class IndexedDatasetImages(DatasetImages):
    """`DatasetImages` of a data set on disk: an `IndexedSource`, which a stream cannot be."""

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> ImageRecord:
        """Row `index`, decoded."""
        with reading(self.name, "a data set"):
            row = self.dataset[index]
        return self._record(index, row)


def _open_dataset(spec: str, target: str, split: str, *, stream: bool) -> DatasetImages:
    """A data set of the hub or of this machine through `datasets`; `target` = path or name[:config], then ?columns."""
    import datasets

    target, _, query = target.partition("?")
    columns = dict(parse_qsl(query, keep_blank_values=True))
    for key in columns.keys() - {"image", "label", "caption"}:
        raise unknown("data: column kind", key, ("image", "label", "caption"))
    path = Path(target).expanduser()
    if spec.startswith("arrow:") and not path.exists():
        raise UserError(f"data: no file or folder {str(path)!r}")
    with reading(f"data: {spec!r}", "a Hugging Face data set"):
        if path.is_file():
            loaded: Any = datasets.Dataset.from_file(str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path.resolve()), streaming=stream)
        else:
            name, _, config = target.partition(":")
            loaded = datasets.load_dataset(name, config or None, streaming=stream)
    if isinstance(loaded, dict):
        loaded = loaded[_choose_split(split, list(loaded), target)]
    elif split != "train":
        raise MissingSplit(f"split: {target!r} has no splits, so all of it is the train split, not {split!r}")
    kind = DatasetImages if isinstance(loaded, datasets.IterableDataset) else IndexedDatasetImages
    with reading(f"data: {spec!r}", "a Hugging Face data set"):
        if kind is IndexedDatasetImages:
            check_buffers(loaded.data.table)
        source = kind(loaded, f"{spec.partition('?')[0]}[{split}]", columns)
    return source


def open_source(spec: str, *, split: str = "train", image_size: int) -> ImageSource:
    """The images that `spec` names.

    * `openmoji`: the emoji of the OpenMoji package, drawn at `image_size` pixels (the only use of `image_size`: images
      of other sources keep their size and are cropped when they are used).
    * `PATH`, `imagefolder:PATH`: a folder of image files, see `ImageFolder`.
    * `hf:OWNER/NAME[:CONFIG]`, `hf:PATH`, `arrow:PATH`: a Hugging Face data set of the hub, or of this machine (saved
      with `save_to_disk`, an .arrow file, or a folder that `load_dataset` reads); `hf-stream:` instead of `hf:` reads
      it while it is used, without keeping it. `?image=NAME&label=NAME&caption=NAME` behind it chooses columns.

    `split` is "train", "validation" or, where the data has more, the name of a split. Raises `UserError` for an unknown
    `spec` or `split`, and for a folder or data set that is missing, empty or ambiguous.
    """
    kind, colon, target = spec.partition(":")
    if spec == "openmoji":
        from consonar.data.openmoji import OpenMoji

        return OpenMoji(split, image_size)  # it checks and names the choices itself
    if colon and kind == "imagefolder":
        return ImageFolder(target, split)
    if colon and kind in ("hf", "hf-stream", "arrow"):
        return _open_dataset(spec, target, split, stream=kind == "hf-stream")
    if Path(spec).expanduser().exists():
        return ImageFolder(spec, split)
    raise UserError(f"data: {spec!r} is neither a folder nor a known source; choices: {', '.join(SPECS)}")
