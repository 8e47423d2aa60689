"""One process that has imported what commands import starts each as a child of its own: a start takes milliseconds.

A child is `consonar WORDS` in a folder of its own, whose writes are answered by who asked for it (`syscalls`). What it
imported while it ran, the server imports before the next.
"""

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Quarters
from faults.syscalls import Fault, listener, supervise

from consonar.cli import main
from consonar.networks import FEATURE_NETWORKS

ROOT = Path(__file__).parents[2]
VARIABLE = re.compile(r"[A-Z_]+=")
WRITING = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.utime",
    "os.link",
    "os.symlink",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, below 0 the signal; what it said; and from which lines of ours it wrote."""

    code: int
    out: str
    err: str
    lines: frozenset[str]


class Server:
    """Starts commands; to be closed."""

    def __init__(self, scratch: Path, **environment: str) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self.socket, theirs = socket.socketpair()
        known = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=known | environment
        )
        theirs.close()

    def run(
        self, words: Sequence[str], folder: Path, fault: Fault | None = None, kill_after: float | None = None
    ) -> Ended:
        """`consonar WORDS` in `folder`, killed after some seconds where they are given; words `NAME=VALUE` are its
        environment's."""
        fault = fault or Fault(folder.resolve())
        request = {"words": list(words), "folder": str(folder), "scratch": str(self.scratch)}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        told, descriptors, _, _ = socket.recv_fds(self.socket, 64, 1)
        if not descriptors:
            raise OSError(told.decode())
        pid, deadline = int(told), None if kill_after is None else time.monotonic() + kill_after

        def late() -> bool:
            if deadline is not None and time.monotonic() > deadline:
                os.kill(pid, 9)
                return True
            return False

        try:
            supervise(descriptors[0], pid, fault, late)
        finally:
            os.close(descriptors[0])
        code = int(self.socket.recv(64))
        out, err = ((self.scratch / name).read_text() for name in ("out", "err"))
        places = self.scratch / "lines"
        lines = frozenset(places.read_text().split()) if places.exists() else frozenset()
        return Ended(code, out, err, lines)

    def close(self) -> None:
        self.socket.close()
        self.process.kill()  # sooner than it takes PyTorch to pieces
        self.process.wait()


def serve(ours: socket.socket) -> None:
    FEATURE_NETWORKS["quarters"] = lambda device: Quarters()
    asked = ours.makefile("r")
    while line := asked.readline():
        request = json.loads(line)
        imported = Path(request["scratch"]) / "imported"
        for name in imported.read_text().split() if imported.exists() else ():
            with suppress(Exception):  # one that only what runs can import
                import_module(name)
        imported.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            child(ours, **request)
        _, status = os.waitpid(pid, 0)
        ours.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def child(ours: socket.socket, words: list[str], folder: str, scratch: str) -> None:
    os.chdir(folder)
    os.environ |= dict(word.split("=") for word in words if VARIABLE.match(word))
    words = [word for word in words if not VARIABLE.match(word)]
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(Path(scratch) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    (Path(scratch) / "lines").unlink(missing_ok=True)
    found: set[str] = set()
    had = set(sys.modules)
    sys.addaudithook(lambda event, about: note_lines(event, about, found))
    try:
        descriptor = listener()
    except OSError as error:
        ours.sendall(str(error).encode())
        os._exit(0)
    socket.send_fds(ours, [str(os.getpid()).encode()], [descriptor])
    os.close(descriptor)
    ours.close()
    second = os.fork() if os.environ.get("WORLD_SIZE") == "2" else None
    if second == 0:
        os.environ["RANK"] = "1"
        os._exit(status(words))
    code = status(words)
    if second is not None:
        code = code or os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    (Path(scratch) / "lines").write_text("\n".join(found))
    # In their order: of a module that is imported before the package that should do it PyTorch's are left half made.
    (Path(scratch) / "imported").write_text("\n".join(name for name in sys.modules if name not in had))
    os._exit(code)


def status(words: list[str]) -> int:
    """`consonar WORDS` to the end of its threads, and its status: of how an interpreter ends without the second that
    taking PyTorch to pieces takes."""
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def note_lines(event: str, about: tuple[object, ...], found: set[str]) -> None:
    """Adds the lines of ours that are being executed while something is written."""
    opened = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not opened and event not in WRITING:
        return
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/src/consonar/" in name:
            found.add(f"{name.split('/src/consonar/')[1]}:{frame.f_lineno}")
        frame = frame.f_back


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
