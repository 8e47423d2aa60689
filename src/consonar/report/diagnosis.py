"""The page of a diagnosis, and diagnosis.json beside it. The page knows no diagnostic, only findings."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from consonar.diagnostics.diagnose import PARTS, Diagnosis
from consonar.diagnostics.findings import Curve, Figure, Finding, HeatMap, Interval
from consonar.errors import UserError
from consonar.files.readers import has_keys
from consonar.files.writers import check_replaced, halves, write_json
from consonar.report import check_page, filled, shows_openmoji, write_page
from consonar.report.charts import LOOKS, Line, Look, svg_chart
from consonar.report.images import picture
from consonar.report.tables import text_of
from consonar.training.origins import flat

LARGEST_PICTURE = 128
"""Pixels; larger ones are shown reduced."""
LIGHT, DARK = (241, 245, 249), (23, 62, 112)
"""Colours of the least and the largest number of a heat map."""
CELL = 10


def check_outputs(out: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where page or numbers cannot be written, or would replace anything but a diagnosis."""
    if out.suffix != ".html":
        raise UserError(f"--out: {out} does not end in .html; the numbers go into a .json of that name beside it")
    check_page(out, overwrite=overwrite)
    is_ours, numbers = partial(has_keys, keys={"subject", "parts"}), out.with_suffix(".json")
    overwrite = overwrite or is_unfinished(out)
    check_replaced(numbers, "--out", "numbers.json", "is no diagnosis", is_ours, overwrite=overwrite)


def is_unfinished(out: Path) -> bool:
    """Whether numbers that lie there are of a process that was killed before it gave the page beside them its name."""
    return not out.exists() and out.parent.is_dir() and bool(halves(out))


def write_diagnosis(diagnosis: Diagnosis, out: Path, *, overwrite: bool) -> Path:
    """Writes the page, and all its numbers beside it; returns the page's path. Raises as `check_outputs`."""
    numbers = out.with_suffix(".json")
    html = render(diagnosis, numbers.name)
    check_outputs(out, overwrite=overwrite)
    is_new = is_unfinished(out) or not numbers.exists()
    try:
        write_page(html, out, beside=lambda: write_json(numbers, diagnosis.content()))
    except BaseException:  # alone they would be in the way of the same command
        if is_new:
            numbers.unlink(missing_ok=True)
        raise
    return out


def render(diagnosis: Diagnosis, numbers: str) -> str:
    """The page as one string of HTML; `numbers` is the name of the file beside it."""
    source = diagnosis.provenance
    return filled(
        "diagnosis.html.jinja",
        runs=(),
        diagnosis=diagnosis,
        numbers=numbers,
        parts=[(name, PARTS[name], finding, drawn(name, finding)) for name, finding in diagnosis.findings.items()],
        missing=[(PARTS[name].title, why) for name, why in diagnosis.unavailable.items()],
        provenance=[(key, text_of(value)) for key, value in flat(source, "")],
        openmoji=shows_openmoji([source["data"], source["pictures"], source.get("tokenizer")]),
    )  # fmt: skip


def drawn(part: str, finding: Finding) -> dict[str, list[Any]]:
    """Charts with their legends, maps and rows of pictures of a finding."""
    charts = [(figure, chart(part, figure), legend(figure.curves)) for figure in finding.figures]
    rows = [(name, [small(image, name) for image in images]) for name, images in finding.pictures.items()]
    return {"charts": charts, "maps": [(one, *heat_map(one)) for one in finding.maps], "rows": rows}


def looks_of(curves: Sequence[Curve]) -> list[Look]:
    """Solid lines told apart by colour and marker; a control is dotted in the colour of its curve."""
    mains = [curve.name for curve in curves if not curve.control]
    return [
        LOOKS[mains.index(curve.control or curve.name)]._replace(dash=":" if curve.control else "-")
        for curve in curves
    ]  # fmt: skip


def legend(curves: Sequence[Curve]) -> list[tuple[Look, str]]:
    """Looks and names, of two curves or more."""
    named = [(look, curve.name) for look, curve in zip(looks_of(curves), curves, strict=True)]
    return named if len(named) > 1 else []


def chart(part: str, figure: Figure) -> Markup:
    """One figure as SVG."""
    lines = [
        Line(look, [(float(x), y.value) for x, y in zip(curve.x, curve.y, strict=True)], [],
             [(y.value - y.low, y.high - y.value) for y in curve.y])
        for look, curve in zip(looks_of(figure.curves), figure.curves, strict=True)
    ]  # fmt: skip
    scale = "log" if figure.log else "linear"
    return svg_chart(lines, f"{PARTS[part].title}, {figure.title}", (figure.x, figure.y), (4.6, 2.9), scale)


def heat_map(values: HeatMap) -> tuple[Markup, float, float]:
    """Squares as SVG that name their number when they are pointed at, and the least and the largest number."""
    known = [value for row in values.rows for value in row if value is not None]
    low, high = min(known), max(known)
    squares = []
    for row, numbers in enumerate(values.rows):
        for column, value in enumerate(numbers):
            if value is not None:
                share = (value - low) / (high - low) if high > low else 0.0
                colour = "#{:02x}{:02x}{:02x}".format(
                    *(round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
                )
                place = f'x="{column * CELL}" y="{row * CELL}" width="{CELL}" height="{CELL}"'
                ends = [end for side in (values.low, values.high) if side and (end := side[row][column]) is not None]
                number = Interval(value, *ends).text if ends else f"{value:.3g}"
                words = f"row {row}, column {column}: {number}"
                squares.append(f'<rect {place} fill="{colour}"><title>{words}</title></rect>')
    size = f"0 0 {max(map(len, values.rows)) * CELL} {len(values.rows) * CELL}"
    head = Markup('<svg class="chart map" viewBox="{}" role="img" aria-label="Heat map: {}">').format(
        size, values.title
    )
    return head + Markup("".join(squares)) + Markup("</svg>"), low, high


def small(image: np.ndarray, alt: str) -> Markup:
    """A picture (H, W, 3) uint8, reduced where it is large."""
    if image.shape[1] > LARGEST_PICTURE:
        side = (LARGEST_PICTURE, round(LARGEST_PICTURE * image.shape[0] / image.shape[1]))
        image = np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BOX))
    return picture(image, alt)
