"""Frontier charts: whole curves over the temperature, because one point can be moved by temperature alone.

Rows that a run was given to match another's entropy (the temperature control) have a ring in the other's colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from consonar.report.charts import LOOKS, draw_ring, svg_chart
from consonar.report.records import ResultRow, Run, find_matched, row_of_matched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENTROPY = "entropy (teacher-forced)"
RING_OF_OTHERS = "#5b616b"
"""Colour of the ring when the matched run is not on the page."""
LABELLED_LINES = 4
"""Of more lines than this only the first has its ends labelled: the labels would lie on each other."""


class Point(NamedTuple):
    """One row of one run in a chart."""

    order: float
    """Points of a line are joined by rising order."""
    x: float
    y: float
    spread: float
    row: ResultRow


class Line(NamedTuple):
    """The rows of one run that share a sampler but for the temperature."""

    run_index: int
    points: list[Point]


def frontier_charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Fréchet distance over temperature and over entropy, and precision over recall; a line per run and sampler.

    Returns [{"title", "note", "svg"}]; a chart that no run has numbers for is left out.
    """
    charts = []
    if lines := _lines(runs, _distance_over_temperature):
        charts.append(_temperature_chart(lines, runs))
    if lines := _lines(runs, _distance_over_entropy):
        charts.append(_entropy_chart(lines, runs))
    if lines := _lines(runs, _precision_over_recall):
        charts.append(_share_chart(lines))
    return charts


def _lines(runs: Sequence[Run], point: Callable[[ResultRow], Point | None]) -> list[Line]:
    """One for each run and sampler setting that `point` has values for."""
    found: dict[tuple[int, tuple[float, int, float]], list[Point]] = {}
    for index, run in enumerate(runs):
        for row in run.results.rows if run.results else ():
            if (made := point(row)) is not None:
                found.setdefault((index, row.sampler), []).append(made)
    return [Line(index, sorted(points, key=lambda p: p.order)) for (index, _), points in found.items()]


def _distance_over_temperature(row: ResultRow) -> Point | None:
    distance = row.held_out_fd
    if distance is None:
        return None
    return Point(row.temperature, row.temperature, distance.value, distance.spread or 0.0, row)


def _distance_over_entropy(row: ResultRow) -> Point | None:
    distance, entropy = row.held_out_fd, row.metrics.get(ENTROPY)
    if distance is None or entropy is None:
        return None
    return Point(entropy.value, entropy.value, distance.value, distance.spread or 0.0, row)


def _precision_over_recall(row: ResultRow) -> Point | None:
    precision, recall = row.metrics.get("precision"), row.metrics.get("recall")
    if precision is None or recall is None:
        return None
    return Point(row.temperature, recall.value, precision.value, 0.0, row)


def _draw_distances(axes: Axes, lines: Sequence[Line], runs: Sequence[Run]) -> None:
    for index, points in lines:
        look = LOOKS[index]
        axes.errorbar(
            [p.x for p in points], [p.y for p in points], yerr=[p.spread for p in points],
            color=look.colour, marker=look.marker, linestyle=look.dash, elinewidth=1.0, capsize=2.5,
        )  # fmt: skip
        for p in points:
            if p.row.matched_to is not None:
                draw_ring(axes, p.x, p.y, _ring_colour(p.row, runs[index], runs))
    axes.set_ylabel("distance to held-out images")


def _ring_colour(row: ResultRow, run: Run, runs: Sequence[Run]) -> str:
    other = find_matched(row, run, runs)
    return RING_OF_OTHERS if other is None else LOOKS[runs.index(other)].colour


def _ring_note(lines: Sequence[Line]) -> str:
    if not any(p.row.matched_to for line in lines for p in line.points):
        return ""
    return " A ring marks the temperature control, in the colour of the run whose entropy it has."


def _temperature_chart(lines: Sequence[Line], runs: Sequence[Run]) -> dict[str, str]:
    def draw(axes: Axes) -> None:
        _draw_distances(axes, lines, runs)
        axes.set_xlabel("temperature")

    # The floor lies far below any small model: said in words, because drawn to scale it would flatten the curves.
    floors = {run.results.noise_floor for run in runs if run.results}
    floor = floors.pop() if len(floors) == 1 else None
    real = "" if floor is None else f" Real held-out images score {floor:.3g} against the training images."
    label = "Line chart: Fréchet distance to held-out images over sampling temperature"
    return {
        "title": "Distance to held-out images over temperature",
        "note": f"Lower is closer. Bars are the spread.{real}{_ring_note(lines)}",
        "svg": svg_chart(draw, "fd", label, inches=(4.6, 2.6)),
    }


def _entropy_chart(lines: Sequence[Line], runs: Sequence[Run]) -> dict[str, str]:
    def draw(axes: Axes) -> None:
        for index, points in lines:
            for p in points:
                _draw_gap(axes, p, runs[index], runs)
        _draw_distances(axes, lines, runs)
        axes.set_xlabel("entropy under the true context (nats per token)")

    gaps = any(row_of_matched(p.row, runs[index], runs)[1] for index, points in lines for p in points)
    thin = " A thin line joins it to that run at temperature 1." if gaps else ""
    label = "Line chart: Fréchet distance to held-out images over the entropy of the next token"
    return {
        "title": "Distance to held-out images over entropy",
        "note": f"Lower is closer; left is sharper. At equal entropy nothing of a gap is sharpness."
        f"{_ring_note(lines)}{thin}",
        "svg": svg_chart(draw, "fd-entropy", label, inches=(4.6, 3.1)),
    }


def _draw_gap(axes: Axes, point: Point, run: Run, runs: Sequence[Run]) -> None:
    _, other = row_of_matched(point.row, run, runs)
    end = None if other is None else _distance_over_entropy(other)
    if end is not None:
        colour = _ring_colour(point.row, run, runs)
        axes.plot([point.x, end.x], [point.y, end.y], color=colour, linewidth=0.8, linestyle="-")


def _share_chart(lines: Sequence[Line]) -> dict[str, str]:
    labelled = len(lines) if len(lines) <= LABELLED_LINES else 1

    def draw(axes: Axes) -> None:
        for number, (index, points) in enumerate(lines, start=1):
            look = LOOKS[index]
            axes.plot(
                [p.x for p in points], [p.y for p in points],
                color=look.colour, marker=look.marker, linestyle=look.dash,
            )  # fmt: skip
            if labelled < number:
                continue
            for p in points[:: max(1, len(points) - 1)]:  # the first and the last
                axes.annotate(
                    f"T {p.row.temperature:.2g}", (p.x, p.y), xytext=(6, 6), textcoords="offset points", fontsize=8,
                    color=look.colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
        axes.margins(x=0.14, y=0.12)
        axes.set_xlabel("recall: share of real variety that is covered")
        axes.set_ylabel("precision: share that looks real")

    which = "each line" if labelled == len(lines) else "the first line"
    label = "Line chart: precision against recall, one point per sampling temperature"
    return {
        "title": "Precision against recall over temperature",
        "note": f"Up and right is better. T marks the lowest and the highest temperature of {which}.",
        "svg": svg_chart(draw, "pr", label, inches=(4.6, 3.1)),
    }
