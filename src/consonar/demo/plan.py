"""The runs of the demo, how much work fits into its minutes on this machine, and how far it is.

Runs of a comparison have the same seed, data order, steps and samples. The rest is arithmetic on measured seconds.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median_high

from consonar.json_types import JsonMap
from consonar.recipes.openmoji import (
    ar_openmoji,
    ce_openmoji,
    isentropic_openmoji,
    rear_openmoji,
    vapi_spatial_openmoji,
)
from consonar.training.config import TrainConfig

Say = Callable[[str], None]

TEMPERATURES = (1.0, 0.7)
RUNS = {"plain-ar": ar_openmoji, "rear": rear_openmoji}
POST_TRAINING = {"ce": ce_openmoji, "vapi": vapi_spatial_openmoji, "isentropic": isentropic_openmoji}
LEAST_STEPS, MOST_STEPS = 8, 10**12
LEAST_UPDATES = 2
FEWEST_SAMPLES, MOST_SAMPLES = 64, 512
UPDATES_PER_STEP = 4 / 21
"""Updates of a post-training run for each step of a training run."""
VALIDATIONS = dict.fromkeys(RUNS, 8) | dict.fromkeys(POST_TRAINING, 3)
"""Of each kind of run; post-training also validates where it starts."""
PAGE_SECONDS = 10.0
"""The page alone is not measured: it needs finished runs."""
SUSTAINED = 1.15
"""Seconds of long work against those of its first steps (warm processor, its neighbours): 1.1 to 1.3 were seen."""

DRAWING, MEASURING, LEAST = 10.0, 109.0, 575.0
"""About the seconds of the opening's pictures, of measuring and of the least work, where docs/results.md is from."""


@dataclass(frozen=True)
class Rate:
    """Seconds of a kind of work, as measured of this machine: `fixed`, and `each` for every unit of it."""

    fixed: float
    each: float = 0.0

    def of(self, count: int) -> float:
        return self.fixed + count * self.each


Rates = Mapping[str, Rate]
"""Of each kind of run by its steps or updates; `measuring` a run, beside each `row` of results by its samples; and once
for all runs `tokens`, `reference` and `features` of the images."""


@dataclass(frozen=True)
class Work:
    """The size of the whole job: the same for all runs of a comparison."""

    steps: int
    updates: int
    samples: int
    """Drawn per row of results."""


PARTS = {name: name for name in RUNS} | {f"{start}-{kind}": kind for start in RUNS for kind in POST_TRAINING}
"""The runs of the job by name, and the kind of each, which its rate is measured under."""


def rows_of(kind: str) -> int:
    """Rows of its results: what others start from has one more, at the temperature of equal entropy."""
    return len(TEMPERATURES) + (kind in RUNS)


def config_of(name: str, out: Path, work: Work, seed: int) -> TrainConfig:
    """The configuration of one of `PARTS`: its recipe at the demo's budget."""
    kind, steps = PARTS[name], work.steps
    if kind in RUNS:
        recipe = RUNS[kind]()
        loop = replace(
            recipe.loop, steps=steps, validate_every=max(1, steps // 8), sample_every=0, save_every=max(1, steps // 4)
        )
        return replace(recipe, recipe=name, seed=seed, data=replace(recipe.data, tokens=str(out / "tokens")), loop=loop)
    recipe, steps = POST_TRAINING[kind](), work.updates
    loop = replace(recipe.loop, steps=steps, log_every=2, validate_every=max(1, steps // 2), save_every=steps)
    return replace(recipe, recipe=name, seed=seed, init=str(out / name.removesuffix(f"-{kind}")), loop=loop)


def training_rate(metrics: Sequence[JsonMap], seconds: float, validations: float) -> Rate:
    """The rate of runs with so many `validations`, from one of `seconds` that logged every step (the lines of its
    metrics.jsonl, in their order); a step takes over 0."""
    steps = [line["time"] for line in metrics if "train/loss" in line]
    spans = zip(metrics, pairwise([0.0, *(line["time"] for line in metrics)]), strict=True)
    measured = [after - before for line, (before, after) in spans if "train/loss" not in line]
    # The clock of metrics.jsonl counts 0.001.
    step = max(median_high(later - earlier for earlier, later in pairwise(steps)), 1e-4)
    setup = max(seconds - len(steps) * step - len(measured) * min(measured), 0.0)
    return Rate(setup + validations * min(measured), step)


def rate_through(few: tuple[int, float], many: tuple[int, float]) -> Rate:
    """The rate from two measurements, each (units, seconds)."""
    each = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
    return Rate(max(few[1] - few[0] * each, 0.0), each)


def work_for(steps: int) -> Work:
    """The work around training runs of `steps` steps: updates in proportion, samples up to `MOST_SAMPLES`."""
    samples = min(MOST_SAMPLES, max(FEWEST_SAMPLES, 2 * steps))
    return Work(steps, max(LEAST_UPDATES, round(steps * UPDATES_PER_STEP)), samples)


def seconds_of(work: Work, rates: Rates, parts: Mapping[str, str] = PARTS) -> dict[str, float]:
    """Seconds of every piece of the job by name, in order: all runs are trained, then all are measured.

    The first run that is measured makes the features of the training images, the others read them.
    """
    pieces, features = {piece: rates[piece].fixed for piece in ("tokens", "reference")}, rates["features"].fixed
    for name, kind in parts.items():
        pieces[f"training {name}"] = rates[kind].of(work.steps if kind in RUNS else work.updates)
    for name, kind in parts.items():
        rows = rows_of(kind) * rates["row"].of(work.samples)
        pieces[f"measuring {name}"] = rates["measuring"].fixed + rows + features
        features = 0.0
    return {piece: SUSTAINED * seconds for piece, seconds in pieces.items()} | {"page": PAGE_SECONDS}


def most_work(seconds: float, rates: Rates) -> Work:
    """The most work that takes no more than `seconds`; the least there is where nothing fits."""
    more = range(LEAST_STEPS + 1, MOST_STEPS)
    fitting = bisect_right(more, seconds, key=lambda steps: sum(seconds_of(work_for(steps), rates).values()))
    return work_for(LEAST_STEPS + fitting)


def first_guess(drawing: float, minutes: float) -> str:
    """What is said of the whole job when the opening was drawn in `drawing` seconds and nothing else is known."""
    slower = drawing / DRAWING
    measuring, least = slower * MEASURING / 60, slower * (DRAWING + MEASURING + LEAST) / 60
    whole = f"{minutes:g} minutes, as asked for" if least <= minutes else f"{least:.0f} minutes, the least there is"
    return f"a first guess, from how fast they were drawn: the whole takes {whole}; measured in {measuring:.1f} minutes"


class Progress:
    """Says how far the whole job is: `[ 37 %, 6 of 15 min] training rear: step 120 of 273`.

    The total moves with what the pieces really take: minutes spent, and what is left as it was estimated.
    """

    def __init__(
        self,
        seconds: Mapping[str, float],
        say: Say,
        *,
        every: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.say, self.every, self.clock = dict(seconds), say, every, clock
        self.done, self.current = 0.0, ""
        self.began = self.said = clock()

    def skip(self, piece: str) -> None:
        """A piece that an earlier call finished, in the time that was estimated."""
        self.done += self.seconds[piece]
        self.began -= self.seconds[piece]

    @contextmanager
    def piece(self, name: str, detail: str = "") -> Iterator[None]:
        """Around the piece that is done now."""
        self.current = name
        self._line(0.0, detail)
        yield
        self.done += self.seconds[name]

    def at(self, share: float, detail: str) -> None:
        """This share, 0 to 1, of the piece is done; a line at most `every` seconds."""
        if self.clock() - self.said >= self.every:
            self._line(share, detail)

    def _line(self, share: float, detail: str) -> None:
        done, total = self.done + share * self.seconds[self.current], sum(self.seconds.values())
        spent = self.clock() - self.began
        whole = (spent + total - done) / 60
        self.said = self.clock()
        text = f"{self.current}: {detail}" if detail else self.current
        self.say(f"[{done / total:4.0%}, {spent / 60:.0f} of {whole:.0f} min] {text}".replace("%", " %", 1))
