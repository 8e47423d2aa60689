"""What a diagnostic hands to the page and to diagnosis.json: numbers with intervals, curves, maps, what they say."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """ "0.123 [0.100, 0.150]", all three with as many decimals as tell the ends apart; "0"."""
        if not all(map(math.isfinite, self)):
            return str(self.value)
        width = max(self.high - self.low, abs(self.value) * 1e-2, 1e-12)
        digits = min(6, max(0, 1 - int(np.floor(np.log10(width)))))
        low, high = (f"{end:.{digits}f}" for end in (self.low, self.high))
        value = f"{self.value:.{digits}f}"
        if low == high:
            return value if float(value) else f"{self.value:.2g}"
        return f"{value} [{low}, {high}]"

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def exactly(value: float) -> Interval:
    """A number without an interval: a count of these very pictures."""
    return Interval(value, value, value)


@dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    name: str
    x: Sequence[float]
    y: Sequence[Interval]
    control: str = ""
    """The curve that this one stands beside, drawn in its colour."""


@dataclass(frozen=True)
class Figure:
    """Curves over one quantity."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    note: str = ""
    """How to read it."""
    log: bool = False
    """Whether x is drawn by its logarithm."""


@dataclass(frozen=True)
class HeatMap:
    """A number for each place; None where there is no place."""

    title: str
    rows: Sequence[Sequence[float | None]]
    unit: str
    note: str = ""
    low: Sequence[Sequence[float | None]] = ()
    high: Sequence[Sequence[float | None]] = ()
    """Ends of the intervals of `rows`, where these have any."""


@dataclass(frozen=True)
class Finding:
    """The result of one diagnostic."""

    summary: str
    """What it shows, in a sentence or two with numbers."""
    numbers: dict[str, Interval]
    """The numbers behind the sentence, by what they are."""
    figures: Sequence[Figure] = ()
    maps: Sequence[HeatMap] = ()
    protocol: str = ""
    """What its Fréchet distances are of, in one line; empty where it has none."""
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """Rows of pictures (k, H, W, 3) uint8 by what they are; not written into diagnosis.json."""

    @property
    def not_finite(self) -> str:
        """The first of what it holds that is no finite number; empty where all are."""
        named: list[tuple[str, Iterable[float | None]]] = [*self.numbers.items()]
        named += [(f.title, [*c.x, *itertools.chain(*c.y)]) for f in self.figures for c in f.curves]
        named += [(m.title, itertools.chain(*m.rows, *m.low, *m.high)) for m in self.maps]
        return next((name for name, values in named if not all(v is None or math.isfinite(v) for v in values)), "")


def resolved(gap: Interval, above: str, below: str, same: str) -> str:
    """One of three phrases: the interval is above 0, below 0, or holds 0."""
    return {1: above, -1: below, 0: same}[gap.sign]


def count_of(gaps: Sequence[Interval], sign: Callable[[Interval], bool]) -> str:
    """ "3 of 5"."""
    return f"{sum(map(sign, gaps))} of {len(gaps)}"
