"""Puts what the runs say and show into the page's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from consonar.json_types import Json
from consonar.metrics import in_order, meanings, metric_of
from consonar.report import images, tables
from consonar.report.charts import LOOKS, frontier_charts
from consonar.report.records import Run, listed, start_text


def render(runs: Sequence[Run], *, title: str | None = None, opening: Path | None = None) -> str:
    """The page as one string of HTML; the same runs give the same string. `opening`: a picture of the shipped model."""
    environment = Environment(
        loader=PackageLoader("consonar.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [run.name for run in runs]
    samples, (settings, verdicts) = images.sample_blocks(runs), tables.verdict_table(runs)
    classes = samples[-1]["classes"] if samples else []
    columns = in_order({name for run in runs for row in run.results.rows for name in row.metrics})
    return environment.get_template("report.html.jinja").render(
        title=title or (f"Run {names[0]}" if len(runs) == 1 else f"{listed(names)}, compared"),
        runs=runs,
        looks=LOOKS,
        metric_of=metric_of,
        hints=tables.HINTS,
        legends=[", from ".join(filter(None, (run.method, start_text(run, runs)))) for run in runs],
        methods={run.row.name: run.row.about for run in runs if run.row and run.row.about},
        withheld=[line for run in runs for line in run.withheld],
        remarks=remarks(runs),
        leading=[classes[i] for i in images.spread_evenly(len(classes), images.LEADING_CLASSES)],
        settings=settings,
        verdicts=verdicts,
        opening=opening and images.file_picture(opening, "samples of the shipped generator, a row for each class"),
        not_evaluated=[run.name for run in runs if not run.results.rows],
        reconstructions=images.reconstruction_groups(runs),
        samples=samples,
        nearest=images.nearest_blocks(runs),
        columns=columns,
        meanings=meanings,
        sections=tables.result_sections(runs, columns),
        frontier=frontier_charts(runs),
        noise_floor=noise_floor(runs),
        training=tables.training_groups(runs),
        grids=[images.training_grids(run) for run in runs],
        from_to=tables.from_to,
        records={
            "Configuration": tables.compared(runs, [run.config for run in runs]),
            "Where this comes from": tables.compared(runs, [provenance_items(run, runs) for run in runs]),
        },
        openmoji=any(uses_openmoji(run) for run in runs),
    )


def noise_floor(runs: Sequence[Run]) -> str:
    """The Fréchet distance of real held-out images to the training images; "" where the runs do not agree on one."""
    floors = [run.results.noise_floor for run in runs if run.results.rows]
    said = {f"{one[name].value:.3g}" for one in floors for name in one if name.startswith("FD(")}
    return said.pop() if len(said) == 1 else ""


def remarks(runs: Sequence[Run]) -> list[str]:
    """What must be known to read the numbers, one sentence each: as measured, and of the temperatures."""
    measured = [run for run in runs if run.results.rows]
    said = [f"{line}." for run in measured for line in run.results.remarks]
    grids = {run.name: sorted({row.temperature for row in run.results.rows if not row.matched_to}) for run in measured}
    if len({tuple(grid) for grid in grids.values()}) > 1:
        text = "; ".join(f"{name} {listed([f'{value:g}' for value in grid])}" for name, grid in grids.items() if grid)
        said.append(f"The runs were measured at different temperatures, and the best is the best of these: {text}.")
    return list(dict.fromkeys(said))


def provenance_items(run: Run, runs: Sequence[Run]) -> Json:
    """Where one run's numbers come from: method, start, steps and time, then all of `results.json` but its rows."""
    items: Json = {"method": run.method}
    if start_text(run, runs):
        items["started from"] = str(run.config["init"])
    if run.metrics:
        items["last step"] = f"{run.metrics[-1]['step']:,}"
        if "time" in run.metrics[-1]:
            items["training time"] = f"{run.metrics[-1]['time'] / 60:.1f} min"
    return {**items, **run.results.provenance}


def uses_openmoji(run: Run) -> bool:
    """Whether the run's data, tokenizer or reference names OpenMoji, whose licence asks for attribution."""
    named = [run.config.get("data"), run.config.get("tokenizer"), run.config.get("recipe")]
    return "openmoji" in json.dumps([*named, run.results.provenance.get("reference")]).lower()
