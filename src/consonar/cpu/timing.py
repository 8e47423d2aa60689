"""Which of two ways to calculate the same is faster on this machine: measured when first asked, kept in the cache.

Both ways agree up to rounding. PyTorch's own is taken unless ours is clearly faster. Answers are kept by processor,
instruction sets, version of PyTorch and number of threads, so that runs on one machine are calculated alike; where the
cache folder cannot be written, a job spans several machines, or the machine is too busy to tell, PyTorch's own way is
taken and no answer kept. A run keeps its own answers too, and goes on with them.
"""

import contextlib
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from consonar.cpu import kernels_mode
from consonar.errors import UserError
from consonar.files.lock import QUIET, hold
from consonar.files.readers import read_json
from consonar.files.writers import cache_dir, write_json

# How many times as fast our way must be: timings of milliseconds repeat to within some percent.
CLEARLY = 1.1
# Calls that must be as fast as the fastest, up to this factor, before a timing counts; seconds spent on it.
ENOUGH, ALIKE, AT_LEAST, PATIENCE = 3, 1.1, 0.02, 1.0
AGAIN = 600.0
"""Seconds until a machine that was too busy is measured again: the processes of one job find the same."""
# What an environment says about instruction sets changes what is faster.
INSTRUCTION_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")

Way = Callable[[], object]
_forced: dict[str, bool] = {}
_known: dict[str, dict[str, float]] = {}


def ours(choice: str, ways: Callable[[], tuple[Way, Way]] | None, patience: float = PATIENCE) -> bool:
    """Whether our way is to be taken for `choice`, e.g. "adamw" or "linear, 8 rows"; up to the comma stands the family.

    `ways()` makes (PyTorch's way, ours) when they are to be timed; both must leave random number generators alone.
    None: ours is faster everywhere, and not timed. `patience`: seconds to try for on a busy machine.
    """
    if (forced_to := _forced.get(choice.partition(",")[0])) is not None:
        return forced_to
    if (mode := kernels_mode()) != "measured":
        return mode == "ours"
    if ways is None:
        return not several_machines()
    key = machine_key(torch.get_num_threads())
    answers = _known.setdefault(key, {})
    if choice not in answers:
        answers[choice] = _measure_and_keep(key, choice, ways, patience)
    return answers[choice] >= CLEARLY


@contextlib.contextmanager
def forced(family: str, take_ours: bool) -> Iterator[None]:
    """Takes one way for a family of choices, whatever was measured (benchmarks and tests compare both)."""
    before = _forced.copy()
    _forced[family] = take_ours
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def keep_for_run(path: Path) -> None:
    """Writes what was taken in this process so far, for `go_on_with`; nothing where nothing was asked."""
    if _known:
        write_json(path, _known)


def go_on_with(path: Path) -> None:
    """Takes on this machine what `keep_for_run` wrote on it, whatever has been measured since."""
    for key, answers in _read(path).items():
        _known.setdefault(key, {}).update(answers)


def kept_answers() -> dict[str, float]:
    """What the cache folder, if there can be one, holds for this machine: {choice: time of PyTorch's way over ours}."""
    try:
        path = cache_dir() / "kernels.json"
    except UserError:
        return {}
    return _read(path).get(machine_key(torch.get_num_threads()), {})


@lru_cache
def processor() -> str:
    """The processor's name, or its architecture where the system does not say."""
    table = Path("/proc/cpuinfo")  # Linux only; elsewhere Python knows as much as there is
    found = re.search(r"^model name\s*: (.*)$", table.read_text() if table.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


@lru_cache
def machine_key(threads: int) -> str:
    """What answers depend on, in words."""
    settings = [f"{name}={os.environ[name]}" for name in INSTRUCTION_SETTINGS if os.environ.get(name)]
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([processor(), capability, *settings, f"torch {torch.__version__}", f"{threads} threads"])


def several_machines() -> bool:
    """Whether torchrun started processes on more than this machine: those need not agree on what is faster."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size != os.environ.get("LOCAL_WORLD_SIZE", size)


def _measure_and_keep(key: str, choice: str, ways: Callable[[], tuple[Way, Way]], patience: float = PATIENCE) -> float:
    """Time of PyTorch's way over ours, from the cache or measured; 1 where nothing can be kept or measured."""
    if several_machines():
        return 1.0
    try:
        folder = cache_dir()
        with hold(folder, wait=True, patience=QUIET):  # processes that start together measure once, one after the other
            everything = _read(folder / "kernels.json")
            answers = everything.setdefault(key, {})
            if choice in answers:
                return answers[choice]
            busy = _read(folder / "kernels-busy.json")
            if abs(time.time() - busy.setdefault(key, {}).get(choice, 0.0)) < AGAIN:
                return 1.0
            # In a checkpointed block PyTorch would calculate that anew for the gradients in here, and ask again.
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                measured = time_ratio(*ways(), patience)
            if measured is None:
                busy[key][choice] = time.time()
                write_json(folder / "kernels-busy.json", busy)
                return 1.0
            answers[choice] = round(measured, 3)
            write_json(folder / "kernels.json", everything)
            return answers[choice]
    except (OSError, UserError):  # cannot be written: an answer that is not kept would change between runs
        return 1.0


def time_ratio(pytorch: Way, other: Way, patience: float = PATIENCE) -> float | None:
    """Seconds of the first over seconds of the second: the fastest of some calls each, in turn, after one unmeasured.

    The fastest, because whatever else the machine does only ever adds time; it counts when each way was `ENOUGH` times
    about as fast. None: that did not happen within `patience` seconds, or as many calls, since the machine is busy.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    pytorch(), other()
    while (elapsed := time.perf_counter() - start) < patience or len(seconds[0]) < ENOUGH:
        for way, taken in zip((pytorch, other), seconds, strict=True):
            begun = time.perf_counter()
            way()
            taken.append(time.perf_counter() - begun)
        fastest = [sorted(taken)[:ENOUGH] for taken in seconds]
        alike = all(len(times) == ENOUGH and times[-1] <= ALIKE * times[0] for times in fastest)
        if alike and (elapsed > AT_LEAST or len(seconds[0]) > 2 * ENOUGH):
            return max(fastest[0][0], 1e-9) / max(fastest[1][0], 1e-9)  # a coarse clock may say 0
    return None


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The kept answers; none where the file is missing or damaged: it is measured anew."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return {
        key: {name: value for name, value in answers.items() if isinstance(value, int | float) and 0 < value < math.inf}
        for key, answers in found.items()
        if isinstance(answers, dict)
    }
