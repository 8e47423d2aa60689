"""Puts what the runs say and show into the page's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from consonar.report.charts import LOOKS, curve_charts
from consonar.report.findings import findings
from consonar.report.frontier import frontier_charts
from consonar.report.images import (
    file_picture,
    leading_pictures,
    nearest_blocks,
    reconstruction_groups,
    sample_blocks,
    training_grids,
)
from consonar.report.post_training import post_training_section
from consonar.report.records import Run, listed, start_text
from consonar.report.tables import HEADINGS, config_rows, control_sections, flatten, result_columns, result_sections
from consonar.report.validity import remarks
from consonar.report.verdicts import verdict_table

__all__ = ["config_rows", "findings", "render"]


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
    samples, (headings, verdicts) = sample_blocks(runs), verdict_table(runs)
    others = [(index, run) for index, run in enumerate(runs) if not run.post_trains]
    return environment.get_template("report.html.jinja").render(
        title=title or (f"Run {names[0]}" if len(runs) == 1 else f"{listed(names)}, compared"),
        runs=runs,
        looks=LOOKS,
        legends=[legend_text(run, runs) for run in runs],
        headings=HEADINGS,
        withheld=[line for run in runs for line in run.withheld],
        findings=[*findings(runs), *remarks(runs)],
        leading=leading_pictures(samples, runs),
        headings_of_verdicts=headings,
        verdicts=verdicts,
        opening=file_picture(opening, "samples of the shipped generator, a row for each class") if opening else None,
        not_evaluated=[run.name for run in runs if not run.results],
        reconstructions=reconstruction_groups(runs),
        samples=samples,
        nearest=nearest_blocks(runs),
        grids=training_grids(runs),
        columns=(columns := result_columns(runs)),
        sections=result_sections(runs, columns),
        controls=control_sections(runs, columns),
        frontier=frontier_charts(runs),
        post_training=post_training_section(runs),
        trained=[index for index, _ in others],
        curves=curve_charts(others),
        config=config_rows(runs),
        provenance=[provenance_items(run, runs) for run in runs],
        openmoji=any(uses_openmoji(run) for run in runs),
    )


def legend_text(run: Run, runs: Sequence[Run]) -> str:
    """ "reAR", or "VA-pi, from rear" for what started from another run."""
    start = start_text(run, runs)
    return f"{run.method}, from {start}" if start else run.method


def provenance_items(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """Where one run's numbers come from: method, start, steps and time, then all of `results.json` but its rows."""
    items = {"method": run.method}
    if start_text(run, runs):
        items["started from"] = str(run.config["init"])
    if run.metrics:
        items["last step"] = f"{run.metrics[-1]['step']:,}"
        if "time" in run.metrics[-1]:
            items["training time"] = f"{run.metrics[-1]['time'] / 60:.1f} min"
    provenance = run.results.provenance if run.results else {}
    return items | flatten({key: value for key, value in provenance.items() if key != "remarks"})


def uses_openmoji(run: Run) -> bool:
    """Whether the run's data, tokenizer or reference names OpenMoji, whose licence asks for attribution."""
    named = [run.config.get("data"), run.config.get("tokenizer"), run.config.get("recipe")]
    reference = run.results.provenance.get("reference") if run.results else None
    return "openmoji" in json.dumps([*named, reference]).lower()
