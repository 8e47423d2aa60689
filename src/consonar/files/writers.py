"""Files that appear whole or not at all, and the cache: what can be rebuilt, as rendered data sets, reference features,
converted weights."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import safetensors

from consonar.errors import UserError, printable
from consonar.files.lock import hold, remove_unheld
from consonar.files.readers import home_expanded

NO_ROOM: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be so large here (ulimit -f)",
}
LONGEST = 200
"""Bytes of a name to which more can be added; file systems take 255."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path, then renames; a failed write leaves what was there.

    It is in a hidden folder beside `path`, which this process holds, and which is removed with all that a library makes
    beside its file (safetensors `.tmpXXXXXX`); where a process was killed, by the next that writes `path`. A link stays
    one, a file that is replaced gives its permissions. Raises as `no_room_said`.
    """
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{short(path.name)}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        with no_room_said(path), hold(half, wait=True):  # who would remove another's half may hold this for a moment
            remove_halves(path)
            partial = half / half.name
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # else a name may outlive a power cut without its content
            if path.exists():
                shutil.copymode(path, partial)
            partial.replace(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def short(name: str) -> str:
    """The name, or digits in its place where it leaves no room for the rest of that of its half."""
    return name if len(os.fsencode(name)) <= LONGEST else hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def halves(path: Path) -> list[Path]:
    """What `write_atomically` has beside `path`, or left there in a process that was killed at it, and nothing of
    outputs whose names go on after a dot (`s.npz` beside `s`)."""
    name = re.compile(rf"\.{re.escape(short(path.name))}\.\d+-[0-9a-f]{{6}}\.partial")
    return [half for half in path.parent.iterdir() if name.fullmatch(half.name) and half.is_dir()]


def remove_halves(path: Path) -> None:
    """Removes the `halves` of processes that were killed."""
    with suppress(OSError):
        for half in halves(path):
            remove_unheld(half)


@contextmanager
def no_room_said(path: Path) -> Iterator[None]:
    """Around what writes beside `path` and then renames: `UserError` where there is no room, with why, what is free,
    and that nothing was replaced."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        if why := no_room(error):
            raise UserError(f"{path}: {why} ({free / 1e6:.0f} MB free); nothing was replaced") from error
        raise


def no_room(error: BaseException) -> str:
    """Why there was no room for a file, in words; empty for any other error."""
    said = re.search(r"os error (\d+)", str(error))
    if why := NO_ROOM.get(int(said[1]) if said else getattr(error, "errno", None)):
        return why
    # What PyTorch says of a write that stopped half way, whatever stopped it.
    cut = re.search(r"No space left|unexpected pos|PytorchStreamWriter|file write failed|iostream error", str(error))
    return "the disk is full, or files may not be so large here (ulimit -f)" if cut else ""


def check_replaced(
    path: Path, key: str, example: str, fault: str, is_ours: Callable[[Path], bool], *, overwrite: bool
) -> None:
    """Raises `UserError` for a folder where a file such as `example` is to be written, and for a file that is not to be
    replaced: without `overwrite` any, else one that `is_ours` does not know, which `fault` says in words."""
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; name a file, such as {path / example}")
    if path.exists() and not path.is_file():  # to read what it holds may wait for ever
        raise UserError(f"{key}: {path} is a pipe or a device; name a file, such as {example}")
    if path.exists() and not overwrite:
        raise UserError(f"{key}: {path} already exists; choose another name, or add --overwrite")
    if path.exists() and not is_ours(path):
        raise UserError(f"{key}: {path} exists and {fault}, so it is not overwritten; choose another name")


def check_writable(out: Path, key: str) -> None:
    """Raises `UserError` where nothing can be written at `out`, before there is work to lose: it is tried."""
    there = Path(os.path.realpath(out))  # a link stays one: what it points to is written
    place = there if there.is_dir() else next(parent for parent in there.parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{key}: {place} cannot be written ({error.strerror}); choose another folder") from error


def write_json(path: Path, value: object) -> None:
    """Raises ValueError for numbers that are not finite, which `parse_json` refuses."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """`$CONSONAR_CACHE`, or `consonar` below `$XDG_CACHE_HOME` or `~/.cache`; made by whoever writes into it.

    Raises `UserError` where no home folder is known.
    """
    if root := os.environ.get("CONSONAR_CACHE"):
        return home_expanded(root)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "consonar"
    try:
        return Path.home() / ".cache" / "consonar"
    except RuntimeError as error:
        raise UserError("cache folder: this user has no home folder; set CONSONAR_CACHE to a folder") from error


def keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """What `write` writes, atomically, into the cache folder; it only saves time: failing costs a line on stderr."""

    def opened(partial: Path) -> None:
        with partial.open("wb") as file:
            write(file)

    try:
        write_atomically(path, opened)
    except (OSError, UserError) as error:
        reason = f"{error.filename or path}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"consonar: not kept in the cache folder: {printable(reason)}", file=sys.stderr)
