"""Which run is ahead of its control, by the Fréchet distance to held-out images and the spread that was measured.

The control is what a run would be without its method: of post-training cross-entropy alone from the same start, else
that start; of training plain AR, else the first run. Ahead or behind is what lies beyond twice the spread of the
difference, sqrt(a^2 + b^2) for independent draws; the rest is no difference. The spread covers drawing again, never
training again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from consonar.report.records import (
    Measurement,
    ResultRow,
    Run,
    find_start,
    measurement_text,
    row_of_matched,
    share_start,
    spread_of_difference,
)

SETTINGS = ("at its best T", "at T 1", "at equal entropy")


class Cell(NamedTuple):
    """ "ahead", "no difference", "behind", "open" or "–", and by how much or why."""

    word: str
    text: str


class Verdict(NamedTuple):
    """One run on the page, the name of its control, and a cell for each of the settings shown."""

    run: Run
    control: str
    cells: list[Cell]


def verdict_table(runs: Sequence[Run]) -> tuple[list[str], list[Verdict]]:
    """Headings, settings that any run was measured at; and a verdict for each run that has a control."""
    scored = [run for run in runs if run.results and any(row.held_out_fd for row in run.results.rows)]
    pairs = [(run, control) for run in scored if (control := control_of(run, scored))]
    cells = [
        [
            compare(best_of(run), best_of(control)),
            compare(at_one(run), at_one(control)),
            at_equal_entropy(run, scored),
        ]
        for run, control in pairs
    ]
    shown = [i for i in range(len(SETTINGS)) if any(row[i].text != NOT_MEASURED for row in cells)]
    verdicts = [
        Verdict(run, control.name, [row[i] for i in shown]) for (run, control), row in zip(pairs, cells, strict=True)
    ]
    return [SETTINGS[i] for i in shown], verdicts


NOT_MEASURED = "not measured"


def control_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """What `run` is judged by; None for what is itself the measure of the others, and where the page has no control."""
    if run.post_trains:
        controls = (other for other in runs if other.post_trains and other.is_control and share_start(run, other))
        return (None if run.is_control else next(controls, None)) or find_start(run, runs)
    trained = [other for other in runs if not other.post_trains]
    plain = next((other for other in trained if other.is_control), trained[0])
    return None if plain is run else plain


def best_of(run: Run) -> ResultRow | None:
    return run.results.best_row if run.results else None


def at_one(run: Run) -> ResultRow | None:
    return run.results.temperature_one if run.results else None


def compare(row: ResultRow | None, base: ResultRow | None) -> Cell:
    """The row of a run against a row of its control; `validity` has seen to it that both were measured alike."""
    if not (row and base and row.held_out_fd and base.held_out_fd):
        return Cell("–", NOT_MEASURED)
    return judge(row.held_out_fd, base.held_out_fd)


def judge(score: Measurement, base: Measurement) -> Cell:
    """Of two distances, lower is better."""
    gap, spread = base.value - score.value, spread_of_difference(score, base)
    if not math.isfinite(gap):
        return Cell("open", "not a finite number")
    if spread is None:
        side = "lower" if gap > 0 else "higher"
        return Cell("open", f"{abs(gap):.3g} {side}, but no spread was measured" if gap else "equal, without a spread")
    word = "no difference" if abs(gap) <= 2 * spread else "ahead" if gap > 0 else "behind"
    return Cell(word, measurement_text(Measurement(abs(gap), spread)))


def at_equal_entropy(run: Run, runs: Sequence[Run]) -> Cell:
    """A post-trained run at temperature 1 against its start at the temperature of the same entropy."""
    start = find_start(run, runs) if run.post_trains else None
    for row in start.results.rows if start and start.results else ():
        other, trained = row_of_matched(row, start, runs) if start else (None, None)
        if start and other is run:
            return compare(trained, row)
    return Cell("–", NOT_MEASURED)
