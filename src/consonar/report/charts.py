"""Charts of the page as inline SVG: courses of training, and frontiers over the temperature.

Whole frontiers, because one point can be moved by temperature alone. Rows that a run was given to match another's
entropy (the temperature control) have a ring in the other's colour. A run has one look everywhere; its name never
enters a chart: the page's legend has it, beside the same colour, marker and dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from consonar.evaluation.results import Measurement
from consonar.metrics import in_order, metric_of
from consonar.report.records import ResultRow, Run, find_matched


class Look(NamedTuple):
    """How one run is drawn: told apart by colour, marker and dash, so that colour alone is never needed."""

    colour: str
    marker: str
    dash: str
    shape: str
    """The marker as an SVG path around (0, 0), for the page's legend."""


class Line(NamedTuple):
    """A line of a chart, and what lies on it."""

    look: Look
    points: Sequence[tuple[float, float]]
    spreads: Sequence[float] | None = None
    """Half the height of a bar at each point."""
    marker_size: float = 5.5
    rings: Sequence[tuple[float, float, str]] = ()
    """Hollow circles: x, y, colour."""


class Chart(NamedTuple):
    """A drawing for the page and what is written around it."""

    title: str
    svg: str
    note: str = ""


LOOKS = (
    Look("#1f5a99", "o", "-", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
    Look("#c2410c", "s", "--", "M-4-4h8v8h-8z"),
    Look("#18794e", "^", "-.", "M0-5L5 4H-5z"),
    Look("#7a2ea0", "D", ":", "M0-5L5 0L0 5L-5 0z"),
    Look("#8a6100", "v", "-", "M0 5L5-4H-5z"),
    Look("#475569", "P", "--", "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z"),
    Look("#be185d", "X", "-.", "M-5-3l2-2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3z"),
    Look("#0e7490", "p", ":", "M0-5L4.8-1.5L2.9 4H-2.9L-4.8-1.5z"),
)

MAX_POINTS = 160
DECIDING = "distance to held-out images"
"""In the place of a metric's name: the one by which runs are judged."""
FRONTIERS = {
    "Distance to held-out images over temperature": ("temperature", DECIDING, "Lower is closer. Bars are the spread."),
    "Distance to held-out images over entropy": (
        "entropy (teacher-forced)", DECIDING,
        "Lower is closer; left is sharper. At equal entropy nothing of a gap is sharpness.",
    ),
    "Precision against recall over temperature": ("recall", "precision", "Up and right is better."),
}  # fmt: skip
"""Title: what goes right, what goes up, and how to read it."""
RING_OF_OTHERS = "#5b616b"
"""Colour of the ring when the matched run is not on the page."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#33373d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
}


def svg_chart(lines: Sequence[Line], title: str, axes_labels: tuple[str, str], inches: tuple[float, float]) -> str:
    """An `<svg>` that scales with its box; charts of different titles and lines share no id."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A salt of its own, for the ids of markers and clip paths.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{title} {lines[0].look.colour}"}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot(xlabel=axes_labels[0], ylabel=axes_labels[1])
        for look, points, spreads, marker_size, rings in lines:
            axes.errorbar(
                [x for x, _ in points], [y for _, y in points], yerr=spreads, color=look.colour, linestyle=look.dash,
                marker=look.marker if marker_size else "", markersize=marker_size, elinewidth=1.0, capsize=2.5,
            )  # fmt: skip
            for x, y, colour in rings:
                axes.plot(x, y, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    head, body = svg[svg.index("<svg") :].split(">", 1)
    view_box = re.findall(r'viewBox="[^"]*"', head)[0]
    # Ids of groups repeat from figure to figure, and nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body).strip()
    return f'<svg class="chart" {view_box} role="img" aria-label="Line chart: {escape(title)}">{body}'


def curve_charts(runs: Sequence[tuple[int, Run]], keys: Sequence[str]) -> list[Chart]:
    """A chart of each quantity that (index, run) logged over the steps.

    What was 0 all the way tells nothing; settings and sums that cannot be compared (`Metric.drawn`) are left out where
    there is anything else.
    """
    moved = [key for key in keys if any(value for _, run in runs for _, value in run.series(key))]
    drawn = [key for key in moved if metric_of(key).drawn] or [key for key in moved if key == "train/loss"]
    return [curve_chart(runs, key) for key in drawn]


def logged_keys(runs: Sequence[tuple[int, Run]]) -> list[str]:
    """The names of all quantities that any of the runs logged."""
    return in_order({key for _, run in runs for line in run.metrics for key in line if "/" in key})


def title_of(key: str) -> str:
    """ "Validation cross-entropy (nats per token)" for `validation/cross_entropy`."""
    split = key.partition("/")[0]
    return f"{'Training' if split == 'train' else split.capitalize()} {metric_of(key).label}"


def curve_chart(runs: Sequence[tuple[int, Run]], key: str) -> Chart:
    """One quantity over the steps, a line for each run, and a ring around what `best.json` was chosen by."""
    lines = []
    for index, run in runs:
        look, points = LOOKS[index], binned(run.series(key))
        sparse = len(points) == 1 or (key.startswith("validation/") and len(points) <= 40)
        best = run.best_model if run.best_model and key == f"validation/{run.best_model['metric']}" else {"step": None}
        rings = [(step, value, look.colour) for step, value in points if step == best["step"]]
        if points:
            lines.append(Line(look, points, marker_size=3.5 if sparse else 0, rings=rings))
    return Chart(title_of(key), svg_chart(lines, title_of(key), ("step", ""), inches=(3.7, 2.5)))


def binned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """(step, value) pairs, as means of equal bins where there are more than `MAX_POINTS`."""
    size = -(-len(points) // MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins]


def frontier_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of `FRONTIERS`; one that no run has numbers for is left out."""
    charts = []
    for title, (right, up, note) in FRONTIERS.items():
        lines = frontier_lines(runs, right, up)
        if any(line.rings for line in lines):
            note += " A ring marks the temperature control, in the colour of the run whose entropy it has."
        labels = metric_of(right).label, metric_of(up).label
        if lines:
            charts.append(Chart(title, svg_chart(lines, title, labels, inches=(4.6, 2.6)), note))
    return charts


def frontier_lines(runs: Sequence[Run], right: str, up: str) -> list[Line]:
    """One for each run and sampler setting (all but the temperature) that has both numbers, by rising temperature."""
    found: dict[Any, list[tuple[ResultRow, Measurement, Measurement]]] = {}
    for index, run in enumerate(runs):
        for row in sorted(run.results.rows, key=lambda row: row.temperature):
            x, y = value_of(row, right), value_of(row, up)
            if x and y:
                found.setdefault((index, row.sampler), []).append((row, x, y))
    lines = []
    for (index, _), rows in found.items():
        spreads = [y.spread or 0.0 for _, _, y in rows] if up == DECIDING else None
        rings = [(x.value, y.value, ring_colour(row, runs[index], runs)) for row, x, y in rows if row.matched_to]
        lines.append(Line(LOOKS[index], [(x.value, y.value) for _, x, y in rows], spreads, rings=rings))
    return lines


def ring_colour(row: ResultRow, run: Run, runs: Sequence[Run]) -> str:
    other, _ = find_matched(row, run, runs)
    return LOOKS[runs.index(other)].colour if other else RING_OF_OTHERS


def value_of(row: ResultRow, name: str) -> Measurement | None:
    if name == "temperature":
        return Measurement(row.temperature)
    return row.deciding if name == DECIDING else row.metrics.get(name)
