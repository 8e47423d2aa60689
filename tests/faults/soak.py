"""Jobs that are killed again and again, at random moments and in the middle of random writes, and go on.

After every kill all that has its name can be read; what a run loses is at most a save interval, and the one whose
checkpoint was being written; and what comes out in the end is, byte for byte, what comes out undisturbed.
"""

import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.server import Server
from faults.syscalls import Fault
from faults.world import EVALUATE, LOOP, TOKENIZE
from faults.writes import LEFT, contents
from PIL import Image

from consonar.data.store_format import TOKENS_FILE
from consonar.data.tokens import TokenStore
from consonar.files.weights import map_tensors
from consonar.training.tracking import read_metrics

WAITS = "--loop.no-async-save"
JOBS = {
    "training": ["train", "ar.yaml", "--out", "soaked"],
    "training that waits": ["train", "ar.yaml", "--out", "soaked", WAITS],
    "VA-pi": ["train", "va.yaml", "--out", "soaked"],
    "tokenising": [*TOKENIZE, "--out", "soaked"],
    "sampling": ["sample", "run", "--num-samples", "1100", "--out", "soaked.npz"],
    "evaluating": ["evaluate", "run", *EVALUATE, "--num-samples", "8", "--temperatures", "1,0.8", "--overwrite"],
}  # fmt: skip
SIGKILL = -9
PATIENCE = 20
"""Calls for one kill: a job may end before its moment comes."""


@dataclass
class Soak:
    """One job in a copy of `before`, killed again and again; `wrong` is what must not be."""

    server: Server
    before: Path
    words: Sequence[str]
    draw: random.Random
    say: Callable[[str], object] = print
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    ends: int = 0
    most_lost: int = 0
    reached: int = 0
    session: int = 0

    def __post_init__(self) -> None:
        self.folder = self.before.with_name("soak")
        self.fresh()
        undisturbed, start = Fault(self.folder), time.monotonic()
        ended = self.server.run(self.words, self.folder, undisturbed)
        assert ended.code == 0, ended.err
        self.seconds, self.writes = time.monotonic() - start, len(undisturbed.seen)
        self.wanted = self.results()

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)
        self.reached = 0

    def results(self) -> dict[str, str]:
        """What is compared: every file by its bytes or its being there, and the metrics without their times."""
        lines = [
            {key: value for key, value in line.items() if key != "time"}
            for line in read_metrics(self.folder / "soaked" / "metrics.jsonl")
        ]
        found = contents(self.folder)
        return {name: what for name, what in found.items() if not name.endswith(".lock")} | {
            "metrics": json.dumps(lines)
        }

    def kill(self, rounds: int) -> None:
        """Kills the job so many times; it goes on after each, and is begun anew where it has ended."""
        self.fresh()
        calls = 0
        while self.kills < rounds and calls < PATIENCE * rounds:
            calls += 1
            self.call(in_a_write=calls % 2 == 0)
        if self.kills < rounds:
            self.wrong.append(f"only {self.kills} kills in {calls} calls")
        for _ in range(2):
            if not self.call(killed=False):
                break

    def call(self, in_a_write: bool = False, killed: bool = True) -> bool:
        """Whether one call of the job was killed."""
        words = list(self.words)
        if words[0] == "train" and (self.folder / "soaked" / "config.json").exists():
            words.append("--resume")
        at = self.draw.randrange(self.writes) if killed and in_a_write else None
        after = self.draw.uniform(0, self.seconds) if killed and not in_a_write else None
        ended = self.server.run(words, self.folder, Fault(self.folder, at, error=0), kill_after=after)
        moment = f"write {at}" if at is not None else f"{after or 0:.3f} s"
        if ended.code == SIGKILL:
            self.kills += 1
            self.wrong += [f"killed at {moment}: {one}" for one in (*damaged(self.folder, self.before), *self.lost())]
            return True
        tidied = ended.code == 2 and "exists; choose another" in ended.err  # it was killed when all but that was done
        if ended.code != 0 and not tidied:
            self.wrong.append(f"did not go on before {moment}: exit {ended.code}, {ended.err[-500:]!r}")
        elif self.results() != self.wanted:
            now = self.results()
            other = [name for name in {**now, **self.wanted} if now.get(name) != self.wanted.get(name)]
            self.wrong.append(f"ended otherwise than undisturbed: {other}")
        self.ends += 1
        self.fresh()
        return False

    def lost(self) -> list[str]:
        """Of a training run: what is wrong with the step it was begun again from."""
        sessions = self.folder / "soaked" / "sessions.json"
        wrong = []
        if sessions.exists() and sessions.stat().st_ino != self.session:
            self.session = sessions.stat().st_ino
            begun = json.loads(sessions.read_text())["sessions"][-1]["step"]
            lost, self.reached = self.reached - begun, 0
            self.most_lost = max(self.most_lost, lost)
            if lost > (1 if WAITS in self.words else 2) * LOOP["save_every"]:
                wrong.append(f"{lost} steps were lost")
        lines = read_metrics(self.folder / "soaked" / "metrics.jsonl")
        self.reached = max(self.reached, lines[-1]["step"] if lines else 0)
        return wrong


def damaged(folder: Path, before: Path) -> list[str]:
    """The files that have their names and cannot be read; pictures that were there `before` are not looked at."""
    wrong = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or LEFT.search(name) or (path.suffix == ".png" and (before / name).exists()):
            continue
        try:
            readable(path)
        except Exception as error:  # whatever it is, the file is the finding
            wrong.append(f"{name}: {error}")
    return wrong


def readable(path: Path) -> None:
    """Raises where a file does not hold what its ending says."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix in (".pt", ".npz"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    elif path.suffix == ".safetensors":
        map_tensors(path)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.name == TOKENS_FILE:
        TokenStore.open(path.parent).check_content()
    elif path.name == "metrics.jsonl":
        read_metrics(path)
