"""What is left, said and possible afterwards when one write of a command fails, or it is asked to end at one."""

import errno
import hashlib
import json
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from faults.server import Ended, Server
from faults.syscalls import Fault, Write

STABLE = {".safetensors", ".npz", ".png", ".arrow", ".yaml"}
"""Files whose bytes are the same in every run of the same command: no time and no version in them."""
OF_THE_MOMENT = rb'\d+\.\d+(e-?\d+)?|\d{4}-\d\d-\d\d[T ]|\d\d:\d\d(:\d\d)?|"pid": \d+'
LEFT = re.compile(r"(^|/)(\.lock|\..*partial|.*\.parts)(/|$)")
"""What only a process that was ended leaves."""
HALF = re.compile(r"(^|/)\.[^/]*partial$")
"""What not even one that was asked to end leaves."""

NO_PICTURE = "no picture of step"
"""What a run says that goes on without one."""


def kinds(writes: Sequence[Write]) -> list[int]:
    """The number of the last write of each kind: a system call on a file, whatever number is in its name."""
    return sorted({(w.call, kind_of(w.path)): i for i, w in enumerate(writes)}.values())


def kind_of(name: str) -> str:
    return re.sub(r"\d+-[0-9a-f]+|\d+", "#", re.sub(r"[^/]*\.partial/\.lock$", "#.lock", name))


def contents(folder: Path) -> dict[str, str]:
    """Every file by path: a hash where its bytes are to be the same, else whether it can be parsed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, held = path.relative_to(folder).as_posix(), path.read_bytes()
            found[name] = hashlib.sha256(held).hexdigest() if path.suffix in STABLE else "there"
            if path.suffix == ".json" and "partial" not in name:
                json.loads(held)
    return found


def state(folder: Path) -> str:
    """What a command finds in `folder`: the bytes of every file, but what time and chance put there: the numbers in
    names, and in texts fractions, dates, times and processes."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        held = path.read_bytes() if path.is_file() else b""
        held = held if path.suffix in {*STABLE, ".pt", ".npy"} else re.sub(OF_THE_MOMENT, b"#", held)
        found.update(repr((kind_of(path.relative_to(folder).as_posix()), hashlib.sha256(held).digest())).encode())
    return found.hexdigest()


class Trials:
    """One command in copies of the folder `before`, undisturbed first."""

    def __init__(self, server: Server, before: Path, words: Sequence[str]) -> None:
        self.server, self.before, self.words = server, before, list(words)
        self.trains, self.out = "train" in words, words[words.index("--out") + 1] if "--out" in words else ""
        self.folder = before.with_name("trial")
        self.had = contents(before)
        self.fresh()
        undisturbed = Fault(self.folder)
        ended = server.run(self.words, self.folder, undisturbed)
        assert ended.code == 0, ended.err
        self.wanted, self.writes, self.lines = contents(self.folder), undisturbed.seen, set(ended.lines)
        self.gone_on = {state(before): list[str]()}

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)

    def fail(self, at: int, error: int = errno.ENOSPC, lasting: bool = False) -> list[str]:
        """What is wrong when write number `at` fails, in words; nothing when all is well."""
        self.fresh()
        fault = Fault(self.folder, at, error, lasting)
        ended = self.server.run(self.words, self.folder, fault)
        self.lines |= ended.lines
        if len(fault.seen) <= at:
            return []  # the command made fewer writes this time
        wrong = [*self.told(ended), *self.kept()]
        if ended.code != 0:
            wrong += self.goes_on()
        elif left := [name for name in self.lacks() if not may_lack(name, ended.err, fault.seen[at])]:
            wrong.append(f"ended well without {left}")
        return [f"{fault.seen[at].call} {fault.seen[at].path} ({at}): {one}" for one in wrong]

    def asked(self, at: int) -> list[str]:
        """What is wrong when SIGTERM comes at write number `at`, in words; nothing when all is well."""
        self.fresh()
        fault = Fault(self.folder, at, ask=True)
        ended = self.server.run(self.words, self.folder, fault)
        if len(fault.seen) <= at:
            return []
        wrong = self.kept()
        if self.trains:  # saved, or not begun
            told = (ended.code == 0 and "Traceback" not in ended.err) or ended.code == -signal.SIGTERM
        else:
            told = ended.code == 0 or (ended.code == 143 and re.fullmatch(r"consonar: asked to end; .*\n", ended.err))
            wrong += [f"{name} is left" for name in contents(self.folder) if HALF.search(name)]
        if not told:
            wrong.append(f"exit {ended.code}, {ended.err[-600:]!r}")
        wrong += self.goes_on()
        return [f"asked at {fault.seen[at].call} {fault.seen[at].path} ({at}): {one}" for one in wrong]

    def told(self, ended: Ended) -> list[str]:
        lines = ended.err.splitlines()
        if ended.code == 0 and "Traceback" not in ended.err:
            return []
        one = ended.code == 2 and sum(line.startswith("consonar: ") for line in lines) == 1 and len(lines) <= 2
        return [] if one else [f"exit {ended.code}, {ended.err[-600:]!r}"]

    def kept(self) -> list[str]:
        """What was there and is neither as it was nor as the command makes it."""
        try:
            now = contents(self.folder)
        except ValueError as error:
            return [f"a damaged file: {error}"]
        return [
            f"{name} is lost" for name, was in self.had.items()
            if name in self.wanted and now.get(name) not in (was, self.wanted[name])
        ]  # fmt: skip

    def goes_on(self) -> list[str]:
        """What is missing after the command was called again; known where it was in a folder like this one."""
        found = state(self.folder)
        if found not in self.gone_on:
            self.gone_on[found] = self.called_again()
        return self.gone_on[found]

    def called_again(self) -> list[str]:
        words = list(self.words)
        if self.trains and "--resume" not in words and (self.folder / self.out / "config.json").exists():
            words.append("--resume")
        ended = self.server.run(words, self.folder)
        if ended.code != 0 and not ("exists" in ended.err and not self.lacks()):
            return [f"called again: exit {ended.code}, {ended.err[-600:]!r}"]
        return [f"called again, without {self.lacks()}"] if self.lacks() else []

    def lacks(self) -> list[str]:
        """Files that are missing or other than wanted, and leftovers: what the undisturbed command does not leave."""
        now = contents(self.folder)
        return [name for name in {**self.wanted, **now} if now.get(name) != self.wanted.get(name)]


def may_lack(name: str, said: str, failed: Write) -> bool:
    """Whether a command may end well so: a picture that it says it goes on without, what a cache could not keep (it is
    made again), a lock file that could not be removed (it stops nobody)."""
    is_lock = failed.call.startswith("unlink") and failed.path == name and name.endswith(".lock")
    return ("/samples/" in name and NO_PICTURE in said) or name.startswith(("cache/", "new-cache/")) or is_lock
