"""Where images come from: a table of the kinds of sources, and `open_source`, which reads what `--data` names.

Every image is decoded completely and converted to RGB (`picture_files.read_image`) when it is read; one that is no
image or is cut short stops with its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from consonar.data.huggingface import open_dataset
from consonar.data.image_folder import ImageFolder, is_split
from consonar.data.labels import read_class_file
from consonar.data.openmoji import OpenMoji
from consonar.data.parts import relabelled
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.types import ImageSource


@dataclass(frozen=True)
class SourceKind:
    """A kind of source. A user writes its name in `SOURCES`, and behind a colon the target, where it has any."""

    open: Callable[[str, str, int], ImageSource]
    """From target (or ""), split and image size; `MissingSplit` for a split that it does not have."""
    targets: tuple[str, ...] = ()
    """What a target looks like, for the list of choices; none for a source that is one data set."""
    has_validation: Callable[[str], bool] = lambda target: False
    """Whether a target is known to have the splits train and validation, without a look into its files."""
    is_drawn: bool = False
    """Whether images are drawn at the image size; others keep theirs and are cropped when they are used."""


SOURCES: dict[str, SourceKind] = {
    "openmoji": SourceKind(lambda _, split, size: OpenMoji(split, size), has_validation=lambda _: True, is_drawn=True),
    "imagefolder": SourceKind(lambda path, split, _: ImageFolder(path, split), ("PATH",), is_split),
    "arrow": SourceKind(lambda path, split, _: open_dataset("arrow", path, split), ("PATH",)),
    "hf": SourceKind(lambda name, split, _: open_dataset("hf", name, split), ("OWNER/NAME[:CONFIG]", "PATH")),
    "hf-stream": SourceKind(lambda name, split, _: open_dataset("hf-stream", name, split), ("...",)),
}


def choices() -> str:
    """What can be written, for messages."""
    forms = [
        form
        for name, kind in SOURCES.items()
        for form in ([f"{name}:{target}" for target in kind.targets] if kind.targets else [name])
    ]
    return ", ".join([forms[0], "PATH", *forms[1:]])


def find_source(spec: str) -> tuple[SourceKind, str]:
    """The kind and target that `spec` means; a path that exists is an image folder. `UserError` for anything else."""
    name, colon, target = spec.partition(":")
    if name in SOURCES and bool(colon) == bool(SOURCES[name].targets):
        return SOURCES[name], target
    if home_expanded(spec).exists():
        return SOURCES["imagefolder"], spec
    raise UserError(f"data: {spec!r} is neither a folder nor a known source; choices: {choices()}")


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
    * `PATH`, `imagefolder:PATH`: a folder of image files, see `ImageFolder`.
    * `hf:OWNER/NAME[:CONFIG]`, `hf:PATH`, `arrow:PATH`: a Hugging Face data set of the hub, or of this machine (saved
      with `save_to_disk`, an .arrow file, or a folder that `load_dataset` reads); `hf-stream:` instead of `hf:` reads
      it while it is used, without keeping it. `?image=NAME&label=NAME&caption=NAME` behind it chooses columns.

    `split` is "train", "validation" or, where the data has more, the name of a split. `classes` is a file that names
    class 0, 1, ... (`labels.read_class_file`), `label_default` what becomes of pictures without a label
    (`parts.relabelled`), by a name of `model_classes` where the images have none. Raises `UserError` for an unknown
    `spec` or `split`, and for a folder or data set that is missing, empty or ambiguous.
    """
    kind, target = find_source(spec)
    source = kind.open(target, split, image_size)
    if classes is None and label_default is None:
        return source
    return relabelled(source, None if classes is None else read_class_file(classes), label_default, model_classes)
