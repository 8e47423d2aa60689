"""Every write of a process passes here first: each can fail, or end the process, before the file system sees it.

The kernel asks (seccomp with user notification, Linux 5.5 and newer, any user), so what PyTorch and Arrow write
natively is seen as well as what Python does. Not seen: bytes that get into a file by no such call, as those of
safetensors do (the making, flushing and naming of its files are), and processes that are started in another way.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

NUMBERS = {
    "x86_64": {
        "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "pwritev2": 328, "sendfile": 40,
        "copy_file_range": 326, "open": 2, "creat": 85, "openat": 257, "fsync": 74, "fdatasync": 75, "ftruncate": 77,
        "fallocate": 285,
        "truncate": 76, "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258, "link": 86,
        "linkat": 265, "symlink": 88, "symlinkat": 266, "chmod": 90, "fchmodat": 268, "fchmod": 91, "utimensat": 280,
        "unlink": 87, "unlinkat": 263, "rmdir": 84,
    },
    "aarch64": {
        "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "pwritev2": 287, "sendfile": 71,
        "copy_file_range": 285, "openat": 56, "fsync": 82, "fdatasync": 83, "ftruncate": 46,
        "fallocate": 47, "truncate": 45, "renameat": 38,
        "renameat2": 276, "mkdirat": 34, "linkat": 37, "symlinkat": 36, "fchmodat": 53, "fchmod": 52, "utimensat": 88,
        "unlinkat": 35,
    },
}.get(platform.machine(), {})  # fmt: skip
SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine(), -1)
NAMES = {number: name for name, number in NUMBERS.items()}
BY_FILE = {
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "fsync",
    "fdatasync",
    "ftruncate",
    "fallocate",
    "fchmod",
}
TO_FILE = {"sendfile": 0, "copy_file_range": 2}
"""Which argument is the open file that is written to; of `BY_FILE` it is the first."""
AT = {"openat": 1, "mkdirat": 1, "unlinkat": 1, "fchmodat": 1, "utimensat": 1, "renameat": 3, "renameat2": 3,
      "linkat": 3, "symlinkat": 2, "rename": 1, "link": 1, "symlink": 1}  # fmt: skip
"""Which argument is the path that is made or changed; of others it is the first."""
RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1
LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def listener() -> int:
    """From now on the writes of this process, its threads and children wait for who reads the returned descriptor.

    Raises OSError where the system has no such thing.
    """
    numbers = sorted(NAMES)
    instruct = struct.Struct("HBBI").pack
    tests = [instruct(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program = instruct(0x20, 0, 0, 0) + b"".join(tests) + instruct(6, 0, 0, 0x7FFF0000) + instruct(6, 0, 0, 0x7FC00000)
    LIBC.prctl(38, 1, 0, 0, 0)  # no new privileges, else a filter is for root
    found = LIBC.syscall(SECCOMP, 1, 8, ctypes.byref(_Program(len(program) // 8, program)))
    if found < 0:
        raise OSError(ctypes.get_errno(), "no seccomp notifications here")
    return found


@dataclass(frozen=True)
class Write:
    """A system call that makes or changes a file: its name, and the path below the folder that is watched."""

    call: str
    path: str


@dataclass
class Fault:
    """What happens to the writes below `root` that are asked for: number `at` (from 0; None: no one) fails with
    `error`, and with `lasting` all after it; error 0 ends the process by SIGKILL in its place. With `ask` it is done,
    and the process gets SIGTERM then."""

    root: Path
    at: int | None = None
    error: int = errno.ENOSPC
    lasting: bool = False
    ask: bool = False
    seen: list[Write] = field(default_factory=list)

    def verdict(self, write: Write) -> int | None:
        """The error that this one gets; None: it is done."""
        number = len(self.seen)
        self.seen.append(write)
        hit = self.at is not None and (number == self.at or (self.lasting and number > self.at))
        return self.error if hit else None


def supervise(notifications: int, pid: int, fault: Fault, until: Callable[[], bool]) -> None:
    """Answers the kernel for process `pid` until there are no more such processes, or `until` says so."""
    poller = select.poll()
    poller.register(notifications)
    while not until():
        for _, event in poller.poll(20):
            if event & select.POLLIN:
                _answer(notifications, pid, fault)
            elif event & (select.POLLHUP | select.POLLERR):
                return


def _answer(notifications: int, pid: int, fault: Fault) -> None:
    asked = bytearray(80)
    try:
        fcntl.ioctl(notifications, RECEIVE, asked)
    except OSError as error:  # it was killed in between
        if error.errno in (errno.ENOENT, errno.EINTR):
            return
        raise
    number, thread, _, call, _, _, *arguments = struct.unpack("QIIiIQ6Q", asked)
    error, asks = None, False
    try:
        write = _write(NAMES[call], thread, arguments, fault.root)
        error = None if write is None else fault.verdict(write)
        if fault.ask and error is not None:
            error, asks = None, True
    except OSError:
        pass  # it has ended
    if error == 0:
        os.kill(pid, signal.SIGKILL)
        return
    answer = struct.pack("QqiI", number, 0, -(error or 0), 0 if error else CONTINUE)
    try:
        fcntl.ioctl(notifications, SEND, bytearray(answer))
    except OSError as gone:
        if gone.errno != errno.ENOENT:
            raise
    if asks:
        os.kill(pid, signal.SIGTERM)


def _write(name: str, thread: int, arguments: list[int], root: Path) -> Write | None:
    """What is asked for; None where it is no write, or not below `root`."""
    if name in BY_FILE or name in TO_FILE:
        path = os.readlink(f"/proc/{thread}/fd/{ctypes.c_int(arguments[TO_FILE.get(name, 0)]).value}")
    else:
        place = AT.get(name, 0)
        if name in ("open", "openat") and not arguments[place + 1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        folder = ctypes.c_int(arguments[place - 1]).value if name.endswith(("at", "at2")) else -100
        here = f"/proc/{thread}/cwd" if folder == -100 else f"/proc/{thread}/fd/{folder}"
        path = os.path.normpath(Path(os.readlink(here)) / _text(thread, arguments[place]))
    path = path.removesuffix(" (deleted)")
    return Write(name, os.path.relpath(path, root)) if path.startswith(f"{root}/") else None


def _text(thread: int, address: int) -> str:
    """The text at an address of another process."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).split(b"\0")[0].decode(errors="surrogateescape")
