"""Runs goldens: finds who handles each, and says how it went. Behind `python -m tests.parity` and `test_goldens.py`."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from golden import Golden

HERE = Path(__file__).parent


class Unhandled(AssertionError):
    """No handler for a golden, or more than one, or arrays that nobody compared."""


@dataclass(frozen=True)
class Outcome:
    """What came out of one golden; `problem` is None when everything in it agreed."""

    name: str
    compared: int
    worst: float
    """Largest error over its tolerance among the compared arrays."""
    skipped: dict[str, str]
    problem: str | None = None

    def line(self) -> str:
        """One line: name, arrays compared, worst error over tolerance, verdict, arrays skipped."""
        text = f"{self.name:28} {self.compared:3} arrays  worst {self.worst:7.2g} of tolerance  "
        text += "pass" if self.problem is None else f"FAIL: {self.problem}"
        reasons = dict.fromkeys(self.skipped.values())
        told = [f"{', '.join(key for key in self.skipped if self.skipped[key] == why)}: {why}" for why in reasons]
        return text + (f"  (not compared: {'; '.join(told)})" if told else "")


def handlers() -> tuple[list[ModuleType], dict[str, str]]:
    """The `golden_*` modules of this folder, and why those that cannot be imported cannot."""
    found, broken = [], {}
    for path in sorted(HERE.glob("golden_*.py")):
        try:
            found.append(importlib.import_module(path.stem))
        except ImportError as error:
            broken[path.name] = str(error)
    return found, broken


def golden_names(folder: Path) -> list[str]:
    """Names of the goldens in a folder: NAME.json that lists arrays, whether or not its NAME.npz is there."""
    return sorted(path.stem for path in folder.glob("*.json") if '"arrays"' in path.read_text())


def run_golden(name: str, folder: Path) -> Golden:
    """Compares every array of one golden; AssertionError with the reason otherwise."""
    golden = Golden(name, folder)
    found, broken = handlers()
    # Goldens of plain functions name no class.
    meta = {**golden.meta, "config": {"cls": "", **golden.meta["config"]}}
    matching = [module for module in found if module.matches(meta)]
    if len(matching) != 1:
        what = meta["config"]["cls"]
        reason = f"{len(matching)} handlers for {what!r}" + "".join(f"; {n}: {why}" for n, why in broken.items())
        raise Unhandled(f"{name}: {reason}; a handler is a file golden_*.py in tests/parity")
    matching[0].run(golden)
    if unseen := golden.unseen():
        raise Unhandled(f"{name}: not compared: {', '.join(unseen)}")
    return golden


def outcome_of(name: str, folder: Path) -> Outcome:
    """`run_golden` told as an outcome, whatever goes wrong in it."""
    try:
        golden = run_golden(name, folder)
    except Exception as error:  # a report of every golden is wanted, so none may end the run
        reason = " ".join(str(error).split()) or "no message"
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome(name, 0, float("nan"), {}, f"{kind}{reason}")
    return Outcome(name, len(golden.errors), max(golden.errors.values(), default=0.0), golden.skipped)


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every golden of the folder agrees, 1 when one does not, 2 for a wrong call."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m tests.parity DIR (a folder of goldens: NAME.json with NAME.npz)", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    names = golden_names(folder)
    if not names:
        print(f"{folder}: no goldens (NAME.json that lists arrays)", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    failed = 0
    for name in names:
        outcome = outcome_of(name, folder)
        failed += outcome.problem is not None
        print(outcome.line(), flush=True)
    print(f"{len(names) - failed} of {len(names)} goldens pass")
    return 1 if failed else 0
