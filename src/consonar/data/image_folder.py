"""A folder of picture files as an image source: its splits and classes."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from consonar.data.picture_files import IMAGE_ENDINGS, PictureFiles, find_pictures, read_image, sub_folders
from consonar.errors import MissingSplit, UserError, printable
from consonar.files.readers import home_expanded
from consonar.origin import content_hash, same_text
from consonar.types import ImageRecord

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""The splits that can be asked for, and the names under which folders and data sets hold them."""
READERS = {".tar": "webdataset", ".parquet": "parquet"}
"""By the ending of a file that holds many pictures, the kind of source that reads it."""


def choose_split(split: str, available: Sequence[str], where: str) -> str:
    """The name among `available` that stands for `split`: where none is called validation, that is `test`. Raises
    `MissingSplit` where none does, `UserError` where several do."""
    for meant in (SPLIT_NAMES.get(split, ()), SPLIT_NAMES["test"] if split == "validation" else ()):
        if found := [name for name in available if name == split or name.lower() in meant]:
            break
    else:
        raise MissingSplit(f"split: {where} has no {split!r}; choices: {', '.join(available)}")
    if len(found) > 1:
        raise UserError(f"split: {where} has {' and '.join(found)}, each a name of {split!r}; keep one of them")
    return found[0]


def split_folders(root: Path) -> list[Path]:
    """The sub-folders that are splits: by their exact names, or in any case where all sub-folders are."""
    children = sub_folders(root)
    names = {name for names in SPLIT_NAMES.values() for name in names}
    splits = [path for path in children if path.name.lower() in names]
    if len(splits) < len(children):  # Train beside Car is a class
        splits = [path for path in splits if path.name in names]
    return [] if [path.name.lower() for path in splits] == ["test"] and len(children) > 1 else splits


def label_of(split: str, chosen: str) -> str:
    """What a source calls the split that it reads: the word that was asked for, but `test` for the test images."""
    return "test" if chosen.lower() in SPLIT_NAMES["test"] else split


def folder_splits(path: str) -> list[str]:
    """The names of the splits of an image folder; none where all of it is one."""
    root = home_expanded(path)
    return [folder.name for folder in split_folders(root)] if root.is_dir() else []


def other_files(source: object) -> str:
    """What else lies in the folder that a source, or what it is made of, is: see `PictureFiles.note`."""
    while hasattr(source, "source"):
        source = source.source
    return source.found.note if isinstance(source, ImageFolder) else ""


class ImageFolder:
    """Images in a folder: the first level of sub-folders are classes, sorted by name; a flat folder has no labels.

    Implements `IndexedSource`. Classes may hold further folders. A folder with `train` and/or `validation` (`val`,
    `valid`), `test` sub-folders (see `split_folders`), or with `test` alone, is a split one; its classes are those of
    all splits together, so that label 3 means the same everywhere. Names that differ only in how accents are composed
    are one class. Raises `UserError` for a missing or empty folder, an empty class, images beside class folders, split
    folders beside other folders (is `train` a split or a class?), and two folders of one split.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = home_expanded(root)
        if not root.is_dir():
            reader = READERS.get(root.suffix.lower(), "")
            hint = f" (it is a file{f', which {reader}:{root} reads' if reader else ''})" if root.exists() else ""
            raise UserError(f"data: no folder {str(root)!r}{hint}")
        folder, class_folders = self._layout(root, split)
        self.root = root
        self.name = f"imagefolder:{root.resolve()}[{split if folder == root else label_of(split, folder.name)}]"
        named: dict[str, str] = {}
        for name in sorted(same_text(path.name) for path in class_folders):
            if (other := named.setdefault(same_text(printable(name)), name)) != name:
                raise UserError(f"data: class folders {other!r} and {name!r} read alike; rename one")
        self.class_names = tuple(sorted(named)) or None
        self.found: PictureFiles = find_pictures(folder)
        self.files = self.found.files
        if not self.files:
            hint = (
                "a data set saved by Hugging Face datasets is opened with arrow:PATH, one of Parquet files with hf:PATH"
            )
            beside = f" beside {self.found.note}" if self.found.note else ""
            endings = ", ".join(IMAGE_ENDINGS)
            raise UserError(f"data: no image in {str(folder)!r}{beside}; looked for {endings} ({hint})")
        self.labels: tuple[int, ...] | None = None
        if self.class_names is not None:
            classes = [path.relative_to(folder).parts[:-1][:1] for path in self.files]  # its first folder, if any
            if () in classes:
                hint = f"{sub_folders(folder)[0].name!r} is one: move the image into it, or it elsewhere"
                raise UserError(f"data: image {str(self.files[classes.index(())])!r} lies beside class folders; {hint}")
            filled = {*classes}
            if empty := [path for path in sub_folders(folder) if (path.name,) not in filled]:
                raise UserError(f"data: class folder {str(empty[0])!r} holds no image file; remove it or fill it")
            index = {name: label for label, name in enumerate(self.class_names)}
            self.labels = tuple(index[same_text(printable(name))] for (name,) in classes)

    @staticmethod
    def _layout(root: Path, split: str) -> tuple[Path, list[Path]]:
        """The folder that holds the wanted split, and the class folders of all splits."""
        children, splits = sub_folders(root), split_folders(root)
        if not splits:
            if split != "train":
                raise MissingSplit(f"split: {str(root)!r} has no folder {split!r}, so all of it is the train split")
            return root, children
        others = [path.name for path in children if path not in splits and find_pictures(path).files]
        if others:
            hint = f"{others[0]!r} stands beside it; give the folder of the split, or rename the class"
            raise UserError(f"data: cannot tell whether {str(splits[0])!r} is a split or a class, for {hint}")
        chosen = root / choose_split(split, [path.name for path in splits], str(root))
        return chosen, [path for folder in splits for path in sub_folders(folder)]

    @cached_property
    def content_hash(self) -> str:
        """`origin.content_hash` of the files, the same wherever the folder lies."""

        def encoded(index: int) -> bytes:
            with suppress(OSError):  # whoever wants the picture will tell
                return self.files[index].read_bytes()
            return b""

        return content_hash([self.picture_name(index) for index in range(len(self))], encoded)

    def __len__(self) -> int:
        return len(self.files)

    def picture_name(self, index: int) -> str:
        """The path of image `index`, in the order of the paths, below the root."""
        return printable(self.files[index].relative_to(self.root).as_posix())

    def read(self, index: int) -> ImageRecord:
        path = self.files[index]
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(read_image(path, str(path)), self.picture_name(index), label)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))
