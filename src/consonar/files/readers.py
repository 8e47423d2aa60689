"""Files from outside, read with care: JSON and NumPy arrays.

Every reader raises one `UserError` with the file's name for whatever is wrong with it. Nothing in a file is executed,
and the size that an array claims is compared with what is there before memory is taken for it.
"""

import json
import math
import os
import re
import zipfile
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from consonar.errors import LONGEST_CAUSE, NotHere, UserError, reading
from consonar.json_types import Json

FOLDER = 0x10
"""The bit of an archive's entry that says so."""


def home_expanded(path: str | Path) -> Path:
    """The path with its `~` or `~name` replaced. `UserError` for an empty path and for a name that nobody has here."""
    if str(path) == "":
        raise UserError("'' is no path; name a file or folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NotHere(f"{path}: nobody is called so here ({error}); write the path without ~") from error


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError for a key that a table has twice (which value counts is nowhere written), and
    for numbers that are not finite, which JSON has not."""
    return json.loads(text, object_pairs_hook=_table, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in table if keys.count(key) > 1)!r} is given twice")
    return table


def text_in(data: bytes, where: object) -> str:
    """A text in UTF-8; `UserError`, which begins with `where`, for other bytes, and for zero bytes, which no text has
    and UTF-16 is full of."""
    with reading(where, "text in UTF-8"):
        if 0 in data:
            raise ValueError("it holds a zero byte")
        return data.decode()


def text_lines(path: Path, where: object, remedy: str = "") -> list[str]:
    """The lines of a text in UTF-8, however they end. `UserError`, which begins with `where`, for what cannot be read,
    which ends with `remedy`, and with its number for a line that is no text."""
    with reading(where, "text in UTF-8", remedy):
        lines = re.split(rb"\r\n?|\n", path.read_bytes().removeprefix(BOM_UTF8))
    return [text_in(line, f"{where} line {number}") for number, line in enumerate(lines, start=1)]


def lines_of(path: Path, where: object, remedy: str = "") -> list[str]:
    """`text_lines` without empty ones at the end."""
    lines = text_lines(path, where, remedy)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def entry_of(value: object, key: str, where: str) -> Any:
    """An entry of a table of JSON. `UserError`, which begins with `where`, for what is no table, and with the entries
    that are there for one without it."""
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}, no table of JSON with the entry "{key}"')
    if key not in value:
        raise UserError(f'{where}: the entry "{key}" is missing; there: {", ".join(value)[:LONGEST_CAUSE] or "none"}')
    return value[key]


def read_json(path: Path, remedy: str = "") -> Json:
    """A JSON file that holds an object; `remedy` ends the message where it does not."""
    with reading(path, "valid JSON with named entries", remedy):
        value = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    return value


def has_keys(path: Path, keys: Set[str]) -> bool:
    """Whether a file is JSON with at least these entries."""
    try:
        return keys <= read_json(path).keys()
    except UserError:
        return False


def check_extent(value: object, most: int = 10_000) -> None:
    """Raises ValueError where tables and lists in each other hold over `most` values, or themselves: references in YAML
    make a few lines into as many values as one likes."""
    waiting, count = [value], 0
    while waiting:
        count += 1
        if count > most:
            raise ValueError(f"over {most} values, or a list that holds itself")
        current = waiting.pop()
        if isinstance(current, (dict, list)):
            waiting += current.values() if isinstance(current, dict) else current


def beside(path: Path, name: object) -> str:
    """`name`, which the file `path` gives to a file beside it. `UserError` when it leads anywhere else."""
    if not isinstance(name, str) or not plain_name(name):
        raise UserError(f"{path}: names {name!r}, which is not a file beside it")
    return name


def plain_name(name: str) -> bool:
    """Whether a text is the name of one file or folder: no path, no `..`, nothing that a system reads otherwise."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


@dataclass(frozen=True)
class ArrayFile:
    """An array in a file, behind its header."""

    file: IO[bytes]
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """All of it, in memory of its own."""
        self.file.seek(0)
        array: np.ndarray = np.lib.format.read_array(self.file, allow_pickle=False)
        return array


def _after_header(file: IO[bytes], size: int) -> ArrayFile:
    """The array in an open .npy of `size` bytes. Raises ValueError for one that does not hold what its header says."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else 'records'}, not numbers or text")
    if min(shape, default=0) < 0 or dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{size - file.tell()} bytes for {dtype} of shape {shape}")
    return ArrayFile(file, shape, fortran_order, dtype)


def read_npy(path: Path, remedy: str = "") -> np.ndarray:
    with reading(path, "a .npy file", remedy), path.open("rb") as file:
        return _after_header(file, os.fstat(file.fileno()).st_size).read()


def check_archive(path: Path | IO[bytes]) -> None:
    """Raises ValueError where a part of a zip archive is not what its checksum says: PyTorch reads without looking."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is another")
        # Of what is marked as a folder PyTorch gives the memory that it would be read into.
        if folders := [entry.filename for entry in archive.infolist() if entry.external_attr & FOLDER]:
            raise ValueError(f"{folders[0]} is a folder")


def npz_keys(path: Path, remedy: str = "") -> list[str]:
    with reading(path, "an .npz", remedy), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"it holds {twice[0]!r} twice")
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


@contextmanager
def npz_member(path: Path, key: str, remedy: str = "make it again") -> Iterator[ArrayFile]:
    """The array `key` of an .npz, to be read part by part; what goes wrong inside the block counts as damage, too."""
    with (
        reading(f"{path}: {key}", "an array", remedy),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{key}.npy") as file,
    ):
        yield _after_header(file, archive.getinfo(f"{key}.npy").file_size)


def read_npz(path: Path, keys: Iterable[str] | None = None, remedy: str = "make it again") -> dict[str, np.ndarray]:
    """The arrays of an .npz: those of `keys` that are there, or all."""
    found = npz_keys(path, remedy)
    arrays = {}
    for key in found if keys is None else [key for key in keys if key in found]:
        with npz_member(path, key, remedy) as member:
            arrays[key] = member.read()
    return arrays
