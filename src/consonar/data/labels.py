"""Labels where they enter: checked, counted, put into a given order of classes, or given to pictures without one."""

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from consonar.errors import UserError, printable, unknown
from consonar.files.readers import home_expanded, lines_of
from consonar.origin import same_text
from consonar.types import ImageSource

MAX_CLASSES = 100_000
"""More than any collection of labelled pictures has; a model has a row of weights for each."""
DROP = "drop"
LABEL_REMEDY = "give it one with --label-default CLASS, or leave such pictures out with --label-default drop"


def check_label(label: int | None, num_classes: int | None, name: str, missing: int | None = None) -> int:
    """The condition of the picture `name` for a model of `num_classes` classes; `UserError` where it has none.

    With one class a picture needs no label, with None (the model reads no classes) none is looked at. `missing` is what
    one without a label gets; None: it is refused.
    """
    if num_classes is None:
        return 0
    if label is None and (missing is not None or num_classes <= 1):
        return missing or 0
    if label is None:
        also = "in post-training also --objective.class-dropout 1: no picture's class is read"
        raise UserError(f"{name}: no label, and there are {num_classes} classes; {LABEL_REMEDY} ({also})")
    if not 0 <= label < max(1, num_classes):
        raise UserError(f"{name}: label {label}, and there are {max(1, num_classes)} classes, from 0 on")
    return label


def known_labels(source: ImageSource) -> Sequence[int | None] | None:
    """The labels of a source that knows them without decoding its pictures, one each; else None."""
    if not (isinstance(source, Sized) and hasattr(source, "labels")):
        return None
    labels = [None] * len(source) if source.labels is None else source.labels
    return [None if label is None else int(label) for label in labels]


def check_labels(source: ImageSource, num_classes: int | None, missing: int | None = None) -> None:
    """`check_label` of every picture whose label is known beforehand, so that a job of hours does not end at one; no
    label is read where `num_classes` is None."""
    if num_classes is None:
        return
    for index, label in enumerate(known_labels(source) or ()):
        if label is None or not 0 <= label < num_classes:  # the name costs more than the look
            check_label(label, num_classes, f"{source.name}: {picture_name(source, index)}", missing)


def picture_name(source: Any, index: int) -> str:  # Any: `sources.Part`, which imports this file, has rows
    """What a source, or what it is a part of, calls a picture that is not read."""
    while hasattr(source, "rows") and hasattr(source, "source"):
        source, index = source.source, source.rows[index]
    named: str = getattr(source, "picture_name", "picture {}".format)(index)
    return named


def read_class_file(path: str | Path) -> tuple[str, ...]:
    """The names of classes 0, 1, ... from a text file, one a line; `UserError` for none and for one named twice.

    `imagenet` means the folder names of ImageNet-1k, in the order in which all models of it count.
    """
    if path == "imagenet":
        lines = Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line.split()[0] for line in lines)
    path = home_expanded(path)
    lines = lines_of(path, f"--classes: {path}", "name a text file of class names, one a line, or imagenet")
    names = [same_text(line.strip()) for line in lines]
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name or name in seen:
            raise UserError(f"--classes: {path}:{number}: {'no name' if not name else f'{name!r} comes twice'}")
        seen.add(name)
    if not names or len(names) > MAX_CLASSES:
        raise UserError(f"--classes: {path} names {len(names)} classes; 1 to {MAX_CLASSES}, one a line")
    return tuple(names)


def places_among(class_names: Sequence[str], own: Sequence[str], where: str) -> tuple[int, ...]:
    """The place of each of `own` among `class_names`; `UserError`, with `where`, for one that is not there."""
    index = {same_text(name): label for label, name in enumerate(class_names)}
    for name in own:
        if same_text(name) not in index:
            raise unknown(where, name, class_names)
    return tuple(index[same_text(name)] for name in own)


def class_id(word: str, names: Sequence[str] | None) -> int:
    """The class that `--label-default` means: an id or a name. `UserError` lists the choices, or why it may be two."""
    ids = {same_text(name): label for label, name in enumerate(names or ())}
    named = ids.get(same_text(word))
    is_id = word.isdecimal() and len(word) < 19 and int(word) < (len(ids) or MAX_CLASSES)
    if is_id and named is not None and named != int(word):
        raise UserError(
            f"--label-default: {word} is the id of class {list(ids)[int(word)]!r} and the name of class {named}; pin "
            "an order in which they are one with --classes FILE"
        )
    if is_id:
        return int(word)
    if named is None:
        choices = [f"0..{len(ids) - 1}" if ids else "a class id", *list(ids)[:20], DROP]
        raise unknown("--label-default", word, choices)
    return named


def describe(source: ImageSource) -> str:
    """`3,906 pictures, 10 classes (Activities … Travel & Places), 0 without a label`: a source before it is read."""
    labels = known_labels(source)
    if labels is not None:
        return data_line(Counter(labels), source.class_names)
    count = f"{len(source):,} pictures" if isinstance(source, Sized) else "a stream of pictures"
    names = source.class_names
    return f"{count}, {class_range(names, len(names))}" if names else f"{count}, classes not known before they are read"


def data_line(counts: Mapping[int | None, int], class_names: Sequence[str] | None) -> str:
    """The line of `describe` from the number of pictures of each label (None: without one); names empty classes, so
    that a label beyond any number of classes is a `UserError`."""
    total, missing = sum(counts.values()), counts.get(None, 0)
    seen = {label for label in counts if label is not None}
    num_classes = len(class_names) if class_names else max(seen, default=-1) + 1
    if num_classes > MAX_CLASSES:
        raise UserError(f"data: label {num_classes - 1}, and there are at most {MAX_CLASSES:,} classes, from 0 on")
    pictures = f"{total:,} picture{'' if total == 1 else 's'}"
    if num_classes == 0:
        return f"{pictures}, no classes"
    line = f"{pictures}, {class_range(class_names, num_classes)}, {missing:,} without a label"
    empty = [label for label in range(num_classes) if label not in seen]
    if empty:
        named = ", ".join(printable(class_names[label]) if class_names else str(label) for label in empty[:3])
        line += f"; no picture of {named}" + (f" and {len(empty) - 3:,} more" if len(empty) > 3 else "")
    return line


def class_range(names: Sequence[str] | None, num_classes: int) -> str:
    """ "10 classes (first ... last)"; names that are numbers in the order of text are shown, for they mislead."""
    names = [printable(name) for name in names] if names else [str(label) for label in range(num_classes)]
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(numbers) == len(names) and numbers != sorted(numbers):
        shown = (
            f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}: in the order of text; --classes FILE pins another"
        )
    else:
        shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    return f"{num_classes:,} class{'' if num_classes == 1 else 'es'} ({shown})"
