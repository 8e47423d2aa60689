"""Charts of the report as inline SVG: light, deterministic, one look per run everywhere.

Names of runs never enter a chart: the page's legend has them, beside the same colour, marker and dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from consonar.report.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Look(NamedTuple):
    """How one run is drawn: told apart by colour, marker and dash, so that colour alone is never needed."""

    colour: str
    marker: str
    dash: str
    shape: str
    """The marker as an SVG path around (0, 0), for the page's legend."""


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

CURVES = {
    "validation/cross_entropy": "Validation cross-entropy (nats per token)",
    "train/cross_entropy": "Training cross-entropy (nats per token)",
    "train/align_current": "Alignment with the current token's code (cosine distance)",
    "train/align_next": "Alignment with the next token's code (cosine distance)",
    "validation/accuracy": "Validation accuracy (share of tokens)",
    "validation/entropy": "Validation entropy (nats per token)",
    "validation/psnr": "Validation PSNR (dB)",
    "train/mse": "Training squared error",
    "train/perceptual": "Training perceptual distance",
    "validation/usage": "Codes used (share of the codebook)",
    "validation/perplexity": "Code perplexity (effective number of codes)",
}
# The total sums different terms in different runs, so it is not comparable; the others are settings, not results.
NOT_DRAWN = {"train/loss", "train/grad_norm", "train/learning_rate", "train/noise_rate"}
MAX_POINTS = 160

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "consonar",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#33373d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "axes.unicode_minus": True,
}


def svg_chart(draw: Any, key: str, label: str, *, inches: tuple[float, float]) -> str:
    """Draw on fresh axes and return an `<svg>` that scales with its box and shares no id with another chart."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    # Group ids repeat from figure to figure and nothing refers to them; markers and clip paths are referred to.
    body = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index(">") + 1 :])
    body = body.replace(' id="', f' id="{key}-').replace("url(#", f"url(#{key}-")
    body = body.replace('xlink:href="#', f'href="#{key}-')
    head = f'<svg class="chart" {view_box.group()} role="img" aria-label="{label}">'
    return head + body.strip()


def curve_charts(runs: Sequence[tuple[int, Run]]) -> list[dict[str, str]]:
    """What (index, run) logged over the steps, one chart per quantity: [{"title", "svg"}], [] for nothing logged."""
    logged = logged_keys(runs)
    drawn = [key for key in CURVES if key in logged] + sorted(logged - CURVES.keys() - NOT_DRAWN)
    if not drawn and "train/loss" in logged:
        drawn = ["train/loss"]
    return [curve_chart(runs, key, CURVES.get(key, key), prefix="curve") for key in drawn]


def logged_keys(runs: Sequence[tuple[int, Run]]) -> set[str]:
    """The names of all quantities that any of the runs logged."""
    return {key for _, run in runs for line in run.metrics for key in line if "/" in key}


def curve_chart(
    runs: Sequence[tuple[int, Run]], key: str, title: str, *, prefix: str, ringed: Collection[tuple[int, float]] = ()
) -> dict[str, str]:
    """One quantity over the steps, a line for each (index, run); a ring around each (index, step) of `ringed`."""
    series = [(index, binned(run.metrics, key)) for index, run in runs]

    def draw(axes: Axes) -> None:
        for index, points in series:
            look = LOOKS[index]
            sparse = len(points) == 1 or (key.startswith("validation/") and len(points) <= 40)
            marker = look.marker if sparse else ""
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=look.colour, linestyle=look.dash, marker=marker, markersize=3.5)
            for step, value in points:
                if (index, step) in ringed:
                    draw_ring(axes, step, value, look.colour)
        axes.set_xlabel("step")

    key_id = f"{prefix}-" + re.sub(r"\W", "-", key)
    label = f"Line chart over training steps: {escape(title)}"
    return {"title": title, "svg": svg_chart(draw, key_id, label, inches=(3.7, 2.5))}


def draw_ring(axes: Axes, x: float, y: float, colour: str) -> None:
    """A hollow circle around a point."""
    axes.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=colour, linestyle="none")


def binned(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The (step, value) pairs of one metric, as means of equal bins where there are more than `MAX_POINTS`."""
    points = [(float(line["step"]), float(line[key])) for line in metrics if line.get(key) is not None]
    size = -(-len(points) // MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins]


def direction(metric: str) -> int:
    """-1 where lower is better, 1 where higher is, 0 where neither is (entropy is a setting, not a merit)."""
    if metric.startswith(("FD(", "sFD(", "copy rate")):
        return -1
    return 1 if metric.startswith("IS(") or metric in ("precision", "recall", "psnr", "ssim") else 0
