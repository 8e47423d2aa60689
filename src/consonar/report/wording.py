"""Comparisons of pairs of scores, put into words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from consonar.report.records import Measurement, listed, spread_of_difference, verdict


class Base(NamedTuple):
    """What a run is compared with, as one run and several runs say it."""

    one: str
    several: str


class Pair(NamedTuple):
    """A run and its base, and the score of each; lower is better."""

    name: str
    base: Base
    score: Measurement
    base_score: Measurement


def named(name: str) -> Base:
    """A run as the base, by its name."""
    return Base(name, name)


def clauses(pairs: Sequence[Pair], *, brief: bool = False) -> list[str]:
    """How every run compares with its base, the pairs of one base and one answer in one clause.

    `brief` leaves out the spreads, and the sizes of what is no difference.
    """
    groups: dict[tuple[Base, str, bool], list[tuple[str, str]]] = {}
    for name, base, score, base_score in pairs:
        spread = spread_of_difference(base_score, score)
        sure = verdict(base_score, score)
        size = f"{abs(score.value - base_score.value):.3g}"
        size += "" if spread is None or brief else f" (spread of the difference {spread:.2g})"
        # Which of two is ahead says nothing where they cannot be told apart.
        ahead = score.value < base_score.value and not (brief and sure == "within")
        groups.setdefault((base, sure, ahead), []).append((name, size))
    return [_clause(*key, members, brief) for key, members in groups.items()]


def _clause(base: Base, sure: str, ahead: bool, members: Sequence[tuple[str, str]], brief: bool) -> str:
    names, sizes = listed([name for name, _ in members]), listed([size for _, size in members])
    other = base.one if len(members) == 1 else base.several
    leads = f"{names} {'is' if len(members) == 1 else 'are'} {'ahead of' if ahead else 'behind'} {other} by {sizes}"
    if sure == "within":
        same = f"{names} cannot be told from {other}"
        return same if brief else f"{same}: the difference, {sizes}, is smaller than its spread"
    spread = "the spread of the difference" if brief else "that spread"
    return {
        "hint": f"{leads}, less than twice {spread}: a hint, not a result",
        "clear": f"{leads}, more than twice {spread}",
        "open": f"{leads}, but no spread was measured, so it is open whether this is chance",
    }[sure]
