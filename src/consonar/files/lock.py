"""One writer per folder, by a lock that the system takes back when its process ends, however it ends.

The lock is on the file `.lock` in the folder, which says who holds it, and by its time when that last said that it
works. After SIGKILL or a crash the file stays, held by nobody, and stops nobody. It is advisory: it keeps processes of
this library apart, not editors. On NFS the server has to support locks (NFSv4 does). Where there are none, and on
systems without `fcntl`, a line on stderr says so.
"""

import errno
import json
import math
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from consonar.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
PARTIAL = ".*.partial"
"""What a file or folder is called while it is written."""
HALF = ".*-??????.partial"
"""The same of the folder in which one file is written."""
MAX_TRIES = 1000
LOOKS = 0.001, 1.0
"""Seconds between two looks of who waits: first, and at most."""
Beat = Callable[[], None]
"""To be called by who works at something that others may wait for, each time that it got on with it."""
Meanwhile = Callable[[], bool | None]
"""What who waits does now and then; True: it need not wait any more."""
QUIET = 1800.0
"""Patience with who makes an entry of the cache."""


class Held(UserError):
    """Another process holds `folder`; `sign` changes while it works. `silent`: for so many seconds it did not."""

    def __init__(self, folder: Path, holder: str, sign: object, silent: float = 0.0) -> None:
        what = "is writing it; wait until that has ended, or end it"
        if silent:
            what = f"holds it and has not got on for {silent:.0f} s; end it, and the same command goes on"
        super().__init__(f"{folder}: {holder} {what}")
        self.folder, self.holder, self.sign = folder, holder, sign


class Waiting:
    """Waits for others who hold something, unless for `patience` seconds there is no sign that they work; calls
    `meanwhile` at every look, which may say that what is waited for is there: then `look` raises as well."""

    def __init__(self, patience: float = math.inf, meanwhile: Meanwhile = lambda: None) -> None:
        self.patience, self.meanwhile, self.pause = patience, meanwhile, LOOKS[0]
        self.sign, self.since = object(), time.monotonic()

    def look(self, held: Held) -> None:
        """Sleeps for a moment. Raises a `Held` that says how long its holder gave no sign, once that is too long."""
        now = time.monotonic()
        if held.sign != self.sign:
            self.sign, self.since = held.sign, now
        if now - self.since > self.patience:
            raise Held(held.folder, held.holder, held.sign, now - self.since)
        if self.meanwhile():
            raise held
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LOOKS[1])


@contextmanager
def hold(
    folder: Path, *, wait: bool = False, patience: float = math.inf, meanwhile: Meanwhile = lambda: None
) -> Iterator[Beat]:
    """Keeps other processes out of `folder`, which is made where it is missing and removed again when it stays empty.

    Gives what its holder calls while it works (`Beat`). Raises `Held` that names who holds it; with `wait`, waits for
    them instead, as `Waiting` does.
    """
    if is_no_folder(folder):
        raise UserError(f"{folder}: is a file; name a folder")
    made: list[Path] = []
    path = folder / LOCK_FILE
    with ExitStack() as at_end:
        at_end.callback(_remove_empty, made)
        file = at_end.enter_context(_locked(path, Waiting(patience, meanwhile) if wait else None, made))
        # Both before the lock is given back: nobody else can hold this file, and who waits for it makes the folders
        # again, and knows then that it did.
        at_end.callback(_remove_empty, made)
        at_end.callback(_unlink, path)
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()

        def beat() -> None:
            with suppress(OSError):  # it was removed with its folder
                os.utime(path)

        yield beat


@contextmanager
def making(entry: Path, *, wait: bool = True, meanwhile: Meanwhile = lambda: None) -> Iterator[Beat]:
    """Around making an `entry` of the cache: who comes second waits, calls `meanwhile` now and then, and should look
    whether it is there by then. Without `wait`, where that cannot be locked, or where its holder is silent for `QUIET`
    seconds, both make it.
    """
    with ExitStack() as held:
        beat: Beat = lambda: None  # noqa: E731
        with suppress(Held, OSError):
            place = entry.with_name(f".{entry.name}.making")
            held.callback(_remove_empty, [place])  # of one that was killed
            beat = held.enter_context(hold(place, wait=wait, patience=QUIET, meanwhile=meanwhile))
        yield beat


@contextmanager
def _locked(path: Path, waiting: Waiting | None, made: list[Path]) -> Iterator[IO[str]]:
    """The open lock file, locked; the folders that were made for it, inner ones first, are added to `made`."""
    tries = 0
    while True:
        try:
            for place in reversed(path.parents):
                if not place.is_dir() and _make(place):
                    made.insert(0, place)
            file = path.open("a+")
        except FileNotFoundError:  # its holder ended in between and removed it
            tries += 1
            if tries == MAX_TRIES:  # nothing can be made there at all, as in /proc
                raise
            continue
        with file:
            while not _take(file, path):  # the same file at every look: another one would be in its holder's way, who
                holder = _holder(file)  # may be about to remove the folder
                held = Held(path.parent, holder, (path, holder, os.fstat(file.fileno()).st_mtime_ns))
                if waiting is None:
                    raise held
                waiting.look(held)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file still lies at `path`; its last holder may have removed it, and another made it anew."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make(folder: Path) -> bool:
    """Makes a folder; False where another process was faster."""
    try:
        folder.mkdir()
    except FileExistsError:
        if os.path.lexists(folder) and not folder.is_dir():  # a file, or a link to nothing
            raise
        return False
    return True


def _unlink(path: Path) -> None:
    with suppress(OSError):  # one that stays stops nobody
        path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Removes the first of these that are empty."""
    with suppress(OSError):  # not empty (or gone): then it was made to stay
        while folders:
            folders.pop(0).rmdir()


def _take(file: IO[str], path: Path) -> bool:
    """Whether the lock is ours now; True as well where there are no locks, after saying so."""
    reason = "this system has no fcntl"
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return False
            reason = error.strerror or str(error)
    if not path.parent.match(HALF):  # one line for each file that is written would be too many
        print(f"consonar: {path.parent}: no lock ({reason}); do not start a second process on it", file=sys.stderr)
    return True


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as its file says; the file is empty for a moment after it was taken."""
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f"process {known['pid']} on {known['host']} (since {known['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def is_taken(path: Path) -> bool:
    """Whether something lies at `path`; an empty folder is nothing."""
    return is_no_folder(path) or (path.is_dir() and not is_unused(path))


def is_no_folder(path: Path) -> bool:
    """Whether something else than a folder lies at `path`, by one look: others make and remove it between two."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


@contextmanager
def folder_at_once(to: Path) -> Iterator[Path]:
    """A folder to fill that becomes `to` when the block ends well, and nothing when it does not.

    Until then it is in a hidden folder beside `to`, where one process works at a time; what a killed one left there is
    removed. Raises `UserError` when another process is at it, or has made `to` meanwhile.
    """
    if os.path.ismount(to):
        raise UserError(f"{to}: is a mount point, whose place nothing can take; name a folder in it")
    if to.is_symlink():
        to = to.resolve()  # what is renamed to a link would not become what it points to
    work = to.with_name(f".{to.name}.partial")
    with hold(work):
        if is_taken(to):
            raise UserError(f"{to}: exists: another process has made it meanwhile; choose another name")
        if to.is_dir():
            with hold(to):
                remove_partials(to)  # a folder is renamed to an empty one only
        unfinished = work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(to)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process leaves that was ended before it wrote anything."""
    return all(path.name == LOCK_FILE or (path.match(PARTIAL) and not is_held(path)) for path in folder.iterdir())


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder`; False as well where there are no locks to tell."""
    with suppress(OSError), (folder / LOCK_FILE).open() as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def remove_partials(folder: Path) -> None:
    """Removes what ended processes left half-written in `folder`, at any depth; to be called by who holds it. What lies
    in folders in it that others hold stays."""
    for path in list(folder.iterdir()):
        if path.match(PARTIAL):
            if (path / LOCK_FILE).exists():
                remove_unheld(path)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        elif path.is_dir() and not path.is_symlink() and not is_held(path):
            with suppress(OSError):  # its holder removed it meanwhile, or it is not ours to read (lost+found)
                remove_partials(path)


def remove_unheld(folder: Path) -> None:
    """Removes `folder`, unless a process holds it, or there are no locks to tell."""
    if fcntl is not None:
        with suppress(OSError), (folder / LOCK_FILE).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
