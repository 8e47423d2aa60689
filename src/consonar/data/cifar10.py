"""CIFAR-10 (Krizhevsky 2009): 50,000 photographs of 32 px in ten classes to train on, and 10,000 as the split test.

None of them is part of the package. They are read in the layout of the public data set, columns `img` and `label`.
"""

import os

from consonar.data.huggingface import open_dataset
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.files.writers import cache_dir
from consonar.types import ImageSource

HUB, VARIABLE = "uoft-cs/cifar10", "CONSONAR_CIFAR10"
LAYOUT = "a folder of Parquet files with the columns img and label"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10_place(target: str) -> str:
    """Where the pictures are: the folder `target`, else the one that `$CONSONAR_CIFAR10` names, else `cifar10` in the
    cache folder where it is there, else the public data set. Raises `UserError` for a folder that is not there."""
    named = target or os.environ.get(VARIABLE)
    if named:
        folder = home_expanded(named.partition("?")[0])
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "is not there"
            raise UserError(f"{'data: cifar10:' if target else VARIABLE + ': '}{named} {found}; a copy is {LAYOUT}")
    local = cache_dir() / "cifar10"
    return named or (str(local) if local.is_dir() else HUB)


def open_cifar10(target: str, split: str) -> ImageSource:
    """A split, called the same wherever it lies. Raises `UserError` for a data set of other classes, or none."""
    place = cifar10_place(target)
    try:
        source = open_dataset("hf", place, split, name="cifar10")
    except UserError as error:
        copy = "a copy on this machine" if place == HUB else "a copy of CIFAR-10"
        raise type(error)(f"{error}; {copy}, which {VARIABLE} or cifar10:PATH names, is {LAYOUT}") from error
    if source.class_names != CLASS_NAMES:
        found = ", ".join((source.class_names or ("none",))[:10])
        raise UserError(f"data: {place!r} is not CIFAR-10, whose classes are {', '.join(CLASS_NAMES)}; it has {found}")
    return source
