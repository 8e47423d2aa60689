"""Charts of the page as inline SVG: courses of training, and frontiers over the temperature.

Whole frontiers, because one point can be moved by temperature alone. Rows that a run was given to match another's
entropy (the temperature control) have a ring in the other's colour. A run has one look everywhere; its name never
enters a chart: the page's legend has it, beside the same colour, marker and dash.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from consonar.evaluation.results import Measurement
from consonar.metrics import metric_of
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
    points: list[tuple[float, float]]
    rings: list[tuple[float, float, str]]
    """Hollow circles: x, y, colour."""
    spreads: list[tuple[float, float]]
    """How far a bar goes down and up from each point; empty: there are none."""
    label: str = ""
    """What stands at its last point."""


class Chart(NamedTuple):
    """A drawing for the page and what is written around it."""

    title: str
    svg: Markup
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
MAX_MARKERS = 20
"""A line of more points is drawn without markers."""
DECIDING = "distance to held-out images"
"""In the place of a metric's name: the one by which runs are judged."""
FRONTIERS = {
    "Distance to held-out images over temperature": ("temperature", DECIDING, "Lower is closer. Bars are the spread."),
    "Distance to held-out images over entropy": (
        "entropy (teacher-forced)", DECIDING,
        "Lower is closer; left is sharper. At equal entropy nothing of a gap is sharpness.",
    ),
    "Precision against recall over temperature": ("recall", "precision", "Up and right is better; bars: the spread."),
}  # fmt: skip
"""Title: what goes right, what goes up, and how to read it."""
RING_OF_OTHERS = "#5b616b"
"""Colour of the ring when the matched run is not on the page."""

LEAST_SPAN = 0.01
"""Of the numbers along an axis, so that those of nearly equal values do not stand upon each other."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#8a8f98",
    "axes.formatter.useoffset": False,  # beside ticks of nearly equal values it stands on the axis's title
    "axes.labelcolor": "#33373d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}


def look_of(index: int) -> Look:
    """The look of run `index` of a page: beyond as many as there are, colours again, with other markers and dashes."""
    look, round_ = LOOKS[index % len(LOOKS)], index // len(LOOKS)
    other = LOOKS[(index + round_) % len(LOOKS)]
    return look._replace(marker=other.marker, shape=other.shape, dash=other.dash)


def svg_chart(
    lines: Sequence[Line], title: str, axes_labels: tuple[str, str], inches: tuple[float, float], scale: str = "linear"
) -> Markup:
    """An `<svg>` that scales with its box; charts of different titles and lines share no id.

    Bars of a line without markers are a band. `scale` is that of the axis to the right, `linear` or `log`.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A salt of its own, for the ids of markers and clip paths.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{title} {lines[0].look.colour}"}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot(xlabel=axes_labels[0], ylabel=axes_labels[1])
        axes.set_xscale(scale)
        if scale == "linear" and all(float(x).is_integer() for line in lines for x, _ in line.points):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        for look, points, rings, spreads, label in lines:
            marked, bars = len(points) <= MAX_MARKERS, [*zip(*spreads, strict=True)] or None
            across, up = [x for x, _ in points], [y for _, y in points]
            axes.errorbar(
                across, up, yerr=bars if marked else None, color=look.colour, linestyle=look.dash,
                marker=look.marker if marked else "", elinewidth=1.0, capsize=2.5,
            )  # fmt: skip
            if bars and not marked:
                low, high = zip(*[(y - a, y + b) for y, (a, b) in zip(up, spreads, strict=True)], strict=True)
                axes.fill_between(across, low, high, color=look.colour, alpha=0.18, linewidth=0)
            if label:
                axes.annotate(label, points[-1], (6, -3), textcoords="offset points", color=look.colour, fontsize=7)
            for x, y, colour in rings:
                axes.plot(x, y, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        left, right = axes.get_xlim()
        if scale == "linear" and right - left < (least := LEAST_SPAN * max(abs(left), abs(right))):
            axes.set_xlim((left + right - least) / 2, (left + right + least) / 2)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _, head, body = re.split(r"<svg([^>]*)>", file.getvalue())
    view_box = re.findall(r'viewBox="[^"]*"', head)[0]
    # Ids of groups repeat from figure to figure, and nothing refers to them.
    drawing = Markup(re.sub(r'<g id="[^"]*"', "<g", body).strip())
    return Markup('<svg class="chart" {} role="img" aria-label="Line chart: {}">{}').format(
        Markup(view_box), title, drawing
    )


def curve_charts(runs: Mapping[int, Run], keys: Sequence[str]) -> list[Chart]:
    """A chart of each quantity over the steps, of runs by their index on the page, and a ring where the best was kept.

    What was 0 all the way tells nothing; settings and sums that cannot be compared (`Metric.drawn`) are left out where
    there is anything else.
    """
    moved = [key for key in keys if any(value for run in runs.values() for _, value in run.series(key))]
    charts = []
    for key in [key for key in moved if metric_of(key).drawn] or [key for key in moved if key == "train/loss"]:
        lines = []
        for index, run in runs.items():
            look, points, best = look_of(index), binned(run.series(key)), run.best_model
            kept = best["step"] if best and key == f"validation/{best['metric']}" else None
            if points:
                lines.append(Line(look, points, [(*point, look.colour) for point in points if point[0] == kept], []))
        charts.append(Chart(title_of(key), svg_chart(lines, title_of(key), ("step", ""), inches=(3.7, 2.5))))
    return charts


def title_of(key: str) -> str:
    """ "Validation cross-entropy (nats per token)" for `validation/cross_entropy`."""
    split = key.partition("/")[0]
    return f"{'Training' if split == 'train' else split.capitalize()} {metric_of(key).label}"


def binned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """(step, value) pairs, as means of equal bins where there are more than `MAX_POINTS`."""
    size = -(-len(points) // MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins]


def frontier_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of `FRONTIERS`; one that no run has numbers for is left out."""
    charts = []
    for title, (right, up, note) in FRONTIERS.items():
        lines = [line for run in runs for line in frontier_lines(run, runs, right, up)]
        if len({line.label for line in lines}) > 1:
            note += " Words at a line are how it was drawn; without any there was neither guidance nor truncation."
        else:
            lines = [line._replace(label="") for line in lines]
        if any(line.rings for line in lines):
            note += " A ring marks the temperature control, in the colour of the run whose entropy it has."
        labels = metric_of(right).label, metric_of(up).label
        if lines:
            charts.append(Chart(title, svg_chart(lines, title, labels, inches=(4.6, 2.6)), note))
    return charts


def frontier_lines(run: Run, runs: Sequence[Run], right: str, up: str) -> list[Line]:
    """One for each sampler setting (all but the temperature) that has both numbers, by rising temperature."""
    lines: dict[Any, Line] = {}
    for row in sorted(run.results.rows, key=lambda row: row.temperature):
        x, y = value_of(row, right), value_of(row, up)
        if x and y:
            line = lines.setdefault(row.sampler, Line(look_of(runs.index(run)), [], [], [], row.sampler_text))
            line.points.append((x.value, y.value))
            line.spreads.append((y.spread or 0.0,) * 2)
            if row.matched_to:
                other, _ = find_matched(row, run, runs)
                colour = look_of(runs.index(other)).colour if other else RING_OF_OTHERS
                line.rings.append((x.value, y.value, colour))
    return list(lines.values())


def value_of(row: ResultRow, name: str) -> Measurement | None:
    if name == "temperature":
        return Measurement(row.temperature)
    return row.deciding if name == DECIDING else row.metrics.get(name)
