"""`python -m tests.faults writes [COMMAND ...] [--every] [--from N]`: a write of each kind (or every one) fails, in
every command. Ctrl-C says with what words it goes on.
`python -m tests.faults asked [COMMAND ...] [--every] [--from N]`: at each of them the command gets SIGTERM.
`python -m tests.faults soak [--rounds N] [--seed S] [JOB ...]`: jobs are killed N times each, and go on."""

import argparse
import random
import shlex
import sys
import tempfile
from bisect import bisect_left
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.server import Server
from faults.soak import JOBS, Soak
from faults.world import COMMANDS, fill, fill_captions, make
from faults.writes import Trials, kinds


def soak(names: list[str], rounds: int, seed: int, before: Path, server: Server) -> int:
    wrong = 0
    for name in names or JOBS:
        job = Soak(server, before, JOBS[name], random.Random(f"{seed} {name}"))
        job.kill(rounds)
        wrong += len(job.wrong)
        lost = f", at most {job.most_lost} steps lost" if JOBS[name][0] == "train" else ""
        print(f"{name}, seed {seed}: {job.kills} kills, {job.ends} ends{lost}, {len(job.wrong)} faults", flush=True)
        for one in job.wrong:
            print(f"  {one}", flush=True)
    return wrong


def writes(names: list[str], every: bool, first: int, before: Path, server: Server, asked: bool = False) -> int:
    wrong = 0
    for name in names:
        trials = Trials(server, before, COMMANDS[name])
        chosen = range(len(trials.writes)) if every else kinds(trials.writes)
        print(f"{name}: {len(chosen)} of {len(trials.writes)} writes", flush=True)
        for at in chosen[bisect_left(chosen, first) :]:
            try:
                faults = trials.asked(at) if asked else trials.fail(at)
            except KeyboardInterrupt:
                left = " ".join(map(shlex.quote, names[names.index(name) :]))
                print(f"stopped: what is left is {left} --from {at}{' --every' * every}", flush=True)
                return wrong + 1
            for fault in faults:
                print(f"  {fault}", flush=True)
                wrong += 1
        first = 0
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("soak", "writes", "asked"))
    parser.add_argument("names", nargs="*", help="jobs or commands, default all")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of a write of the first command")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder).resolve() / "before"
        before.mkdir()
        server = Server(before.with_name("scratch"), CONSONAR_KERNELS="pytorch", CONSONAR_CACHE="cache")
        fill(before)
        fill_captions(before)
        make(before, server)
        if given.what == "soak":
            wrong = soak(given.names, given.rounds, given.seed, before, server)
        else:
            names = given.names or list(COMMANDS)
            wrong = writes(names, given.every, given.first, before, server, given.what == "asked")
        server.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
