"""Charts and tables of the report. Charts are inline SVG: light, deterministic, one look per run everywhere.

Names of runs never enter a chart: the page's legend has them, beside the same colour, marker and dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from consonar.report import ResultRow, Run, measurement_text, verdict

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


def _svg(draw: Any, key: str, label: str, *, inches: tuple[float, float]) -> str:
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


def frontier_charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Fréchet distance over temperature, and precision over recall, one line per run and sampler setting.

    Returns [{"title", "note", "svg"}]; a chart that no run has numbers for is left out.
    """
    distances = _series(runs, lambda row: None if row.held_out_fd is None else (row.temperature, row.held_out_fd))
    shares = _series(runs, _precision_recall)
    return ([_distance_chart(distances, runs)] if distances else []) + ([_share_chart(shares)] if shares else [])


def _distance_chart(series: Sequence[tuple[int, list[tuple[float, Any]]]], runs: Sequence[Run]) -> dict[str, str]:
    def draw(axes: Axes) -> None:
        for index, points in series:
            look = LOOKS[index]
            axes.errorbar(
                [temperature for temperature, _ in points],
                [measured.value for _, measured in points],
                yerr=[measured.spread or 0.0 for _, measured in points],
                color=look.colour, marker=look.marker, linestyle=look.dash, elinewidth=1.0, capsize=2.5,
            )  # fmt: skip
        axes.set_xlabel("temperature")
        axes.set_ylabel("Fréchet distance to held-out images")

    # The floor lies far below any small model: said in words, because drawn to scale it would flatten the curves.
    floors = {run.results.noise_floor for run in runs if run.results}
    floor = floors.pop() if len(floors) == 1 else None
    real = "" if floor is None else f" Real held-out images score {floor:.3g} against the training images."
    label = "Line chart: Fréchet distance to held-out images over sampling temperature"
    return {
        "title": "Distance to held-out images over temperature",
        "note": f"Lower is closer. Bars are the spread.{real}",
        "svg": _svg(draw, "fd", label, inches=(4.6, 3.1)),
    }


def _share_chart(series: Sequence[tuple[int, list[tuple[float, Any]]]]) -> dict[str, str]:
    def draw(axes: Axes) -> None:
        for index, points in series:
            look = LOOKS[index]
            recall, precision = [r for _, (r, _) in points], [p for _, (_, p) in points]
            axes.plot(recall, precision, color=look.colour, marker=look.marker, linestyle=look.dash)
            for temperature, at in dict.fromkeys([points[0], points[-1]]):
                axes.annotate(
                    f"T {temperature:g}", at, xytext=(6, 6), textcoords="offset points", fontsize=8, color=look.colour,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
        axes.margins(x=0.14, y=0.12)
        axes.set_xlabel("recall: share of real variety that is covered")
        axes.set_ylabel("precision: share that looks real")

    label = "Line chart: precision against recall, one point per sampling temperature"
    return {
        "title": "Precision against recall over temperature",
        "note": "Up and right is better. T marks the lowest and the highest temperature of each line.",
        "svg": _svg(draw, "pr", label, inches=(4.6, 3.1)),
    }


def _precision_recall(row: Any) -> tuple[float, tuple[float, float]] | None:
    if "precision" not in row.metrics or "recall" not in row.metrics:
        return None
    return row.temperature, (row.metrics["recall"].value, row.metrics["precision"].value)


def _series(runs: Sequence[Run], point: Any) -> list[tuple[int, list[tuple[float, Any]]]]:
    """[(run index, points by rising temperature)], one per run and sampler setting that `point` has values for."""
    series: dict[tuple[int, Any], list[tuple[float, Any]]] = {}
    for index, run in enumerate(runs):
        for row in run.results.rows if run.results else ():
            value = point(row)
            if value is not None:
                series.setdefault((index, row.sampler), []).append(value)
    return [(index, sorted(points, key=lambda p: p[0])) for (index, _), points in series.items()]


def curve_charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What was logged over the steps, one chart per quantity: [{"title", "svg"}], [] where nothing was logged."""
    logged = {key for run in runs for line in run.metrics for key in line if "/" in key}
    drawn = [key for key in CURVES if key in logged] + sorted(logged - CURVES.keys() - NOT_DRAWN)
    if not drawn and "train/loss" in logged:
        drawn = ["train/loss"]
    charts = []
    for key in drawn:
        series = [(index, binned(run.metrics, key)) for index, run in enumerate(runs)]

        def draw(axes: Axes, series: Any = series, key: str = key) -> None:
            for index, points in series:
                look = LOOKS[index]
                sparse = len(points) == 1 or (key.startswith("validation/") and len(points) <= 40)
                marker = look.marker if sparse else ""
                steps, values = [step for step, _ in points], [value for _, value in points]
                axes.plot(steps, values, color=look.colour, linestyle=look.dash, marker=marker, markersize=3.5)
            axes.set_xlabel("step")

        title = CURVES.get(key, key)
        key_id = "curve-" + re.sub(r"\W", "-", key)
        charts.append(
            {
                "title": title,
                "svg": _svg(draw, key_id, f"Line chart over training steps: {escape(title)}", inches=(3.7, 2.5)),
            }
        )
    return charts


def binned(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The (step, value) pairs of one metric, as means of equal bins where there are more than `MAX_POINTS`."""
    points = [(float(line["step"]), float(line[key])) for line in metrics if line.get(key) is not None]
    size = -(-len(points) // MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins]


def direction(metric: str) -> int:
    """-1 where lower is better, 1 where higher is, 0 where neither is (entropy is a setting, not a merit)."""
    if metric.startswith(("FD(", "copy rate")):
        return -1
    return 1 if metric in ("precision", "recall", "psnr", "ssim") else 0


def result_sections(runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The table: a section at temperature 1, one at each run's own best setting, and the whole grid, folded.

    Each section is {"title", "folded", "rows"}, each row {"index", "run", "row", "cells"}, each cell {"text", "mark"};
    the mark "best" is the best of its column in the section, "close" what the spread does not tell from it.
    """
    measured = [(index, run, run.results) for index, run in enumerate(runs) if run.results]
    sections: list[tuple[str, bool, list[tuple[int, Run, ResultRow | None]]]] = [
        ("At temperature 1", False, [(i, run, results.temperature_one) for i, run, results in measured]),
        ("Each at its own best temperature", False, [(i, run, results.best_row) for i, run, results in measured]),
        ("Everything measured", True, [(i, run, row) for i, run, results in measured for row in results.rows]),
    ]
    return [
        {"title": title, "folded": folded, "rows": _table_rows([e for e in entries if e[2] is not None], columns)}
        for title, folded, entries in sections
        if any(row is not None for _, _, row in entries)
    ]


def _table_rows(entries: Sequence[tuple[int, Run, Any]], columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"index": index, "run": run, "row": row, "cells": []} for index, run, row in entries]
    for column in columns:
        metric = column["metric"]
        sign = direction(metric)
        present = [row.metrics[metric] for _, _, row in entries if metric in row.metrics]
        # Where all are equal there is no best to point at.
        differ = sign and len({measured.value for measured in present}) > 1
        best = max(present, key=lambda measured: sign * measured.value) if differ else None
        for (_, _, row), entry in zip(entries, rows, strict=True):
            measured = row.metrics.get(metric)
            if measured is None:
                entry["cells"].append({"text": "", "mark": ""})
                continue
            text = measurement_text(measured, percent=metric.startswith("copy rate"))
            mark = ""
            if best is not None:
                mark = (
                    "best" if measured.value == best.value else "close" if verdict(measured, best) == "within" else ""
                )
            entry["cells"].append({"text": text, "mark": mark})
    return rows
