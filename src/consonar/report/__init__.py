"""The report: one self-contained HTML page about one to eight runs.

`folders` reads run folders into `records`; `tables`, `charts` and `images` lay out what is in them, and the template
holds the explanations and the design. What a number is called and means, and which way it is better, stands in
`consonar.metrics.METRICS`; what a method is called and does in `training.objectives.METHODS`.
No number comes from outside the run folders, so two calls give the same bytes.

A run folder holds `config.json`, and any of `metrics.jsonl`, `results.json` (schema 1) with its `samples_*.npz`,
`reconstructions.npz`, `reconstruction.json`, `samples/step_*.png`, and of post-training `stopped.json` and `best.json`.
What is missing is left out of the page; what is there and broken is a `UserError`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from consonar.files.writers import check_replaced, write_atomically
from consonar.json_types import Json
from consonar.metrics import in_order, meanings, metric_of
from consonar.report import images, tables
from consonar.report.charts import frontier_charts, look_of
from consonar.report.folders import MAX_RUNS, load_runs
from consonar.report.records import Run, listed, start_text, told_once
from consonar.report.scores import score_table

__all__ = ["MAX_RUNS", "load_runs", "write_report"]


def write_report(
    runs: Sequence[Path], out: Path, *, title: str | None = None, opening: Path | None = None, overwrite: bool = False
) -> Path:
    """Write one HTML page that compares 1 to 8 runs, and return its path. `opening`: a picture to show beside them.

    The page needs no network and no script. It is written under a temporary name and renamed, so that a failure leaves
    no half page. Raises `UserError` for a wrong number of runs, a missing or broken run folder, and an `out` that
    exists (unless `overwrite`).
    """
    check_page(out := Path(out), overwrite=overwrite)
    html = render(load_runs(runs), title=title, opening=opening)
    check_page(out, overwrite=overwrite)  # another may have come meanwhile
    write_page(html, out)
    return out


def check_page(out: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where a page cannot be written, or would replace anything but a page."""
    check_replaced(out, "--out", "report.html", "is no page", is_page, overwrite=overwrite)


def is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<!doctype html>" in file.read(100)


def render(runs: Sequence[Run], *, title: str | None = None, opening: Path | None = None) -> str:
    """The page as one string of HTML; the same runs give the same string. `opening`: a picture of the shipped model."""
    names = [run.name for run in runs]
    sheets, (settings, verdicts) = images.load_sheets(runs), tables.verdict_table(runs)
    samples, paired = images.sample_lines(runs, sheets)
    leading = [samples[i] for i in images.spread_evenly(len(samples), images.LEADING_CLASSES)]
    named = [
        [*map(run.config.get, ("data", "tokenizer", "recipe")), run.results.provenance.get("reference")] for run in runs
    ]
    columns = in_order({name for run in runs for row in run.results.rows for name in row.metrics})
    return filled(
        "report.html.jinja",
        title=title or (f"Run {names[0]}" if len(runs) == 1 else f"{listed(names)}, compared"),
        runs=runs,
        from_to=tables.from_to,
        legends=[", from ".join(filter(None, (run.method, start_text(run, runs)))) for run in runs],
        methods={run.row.name: run.row.about for run in runs if run.row and run.row.about},
        remarks=remarks(runs),
        leading=leading,
        leading_rows=min(max(6 // len(runs), 1), max((len(cell) for _, cells in leading for cell in cells), default=0)),
        kind="prompt" if any(sheet.of_prompts for sheet in sheets if sheet) else "class",
        settings=settings,
        verdicts=verdicts,
        opening=opening and images.picture(opening, "samples of the shipped generator, a row for each class"),
        reconstructions=images.reconstruction_groups(runs),
        scores=score_table(runs),
        samples=samples,
        paired=paired,
        nearest=images.nearest_pairs(runs, sheets),
        columns=columns,
        sections=tables.result_sections(runs, columns),
        protocols=protocols(runs),
        frontier=frontier_charts(runs),
        noise_floor=noise_floor(runs),
        training=tables.training_groups(runs),
        grids=[images.training_grids(run) for run in runs],
        records=tables.compared(runs, [record_of(run, runs) for run in runs]),
        openmoji=shows_openmoji(named),
    )


def filled(template: str, *, runs: Sequence[Run], **values: object) -> str:
    """A template with what `parts.html.jinja` asks for: every run has a look."""
    environment = Environment(
        loader=PackageLoader("consonar.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    looks = [look_of(index) for index in range(len(runs))]
    named = {"runs": runs, "looks": looks, "metric_of": metric_of, "meanings": meanings}
    return environment.get_template(template).render(**named, **values)


def write_page(html: str, out: Path, beside: Callable[[], object] = lambda: None) -> None:
    """Under a temporary name first, so that a failure leaves no half page; names of files need not be UTF-8. `beside`
    is called when all is written, before the page has its name."""

    def write(partial: Path) -> None:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")
        beside()

    write_atomically(out, write)


def noise_floor(runs: Sequence[Run]) -> str:
    """The Fréchet distance of real held-out images to the training images; "" where the runs do not agree on one."""
    floors = [run.results.noise_floor for run in runs if run.results.rows]
    said = {f"{one[name].value:.3g}" for one in floors for name in one if name.startswith("FD(")}
    return said.pop() if len(said) == 1 else ""


def protocols(runs: Sequence[Run]) -> list[str]:
    """What the numbers are of, in a line; where runs say it in other words (a reference has moved), a line for each."""
    said = {run.name: text for run in runs if run.results.rows and (text := run.results.provenance.get("protocol"))}
    alike = len(set(map(str, said.values()))) == 1
    return [
        f"Protocol{'' if alike else f' of {name}'}: {text}."
        for name, text in list(said.items())[: 1 if alike else None]
    ]


def remarks(runs: Sequence[Run]) -> list[str]:
    """What must be known to read the numbers, one sentence each: as measured, and of the temperatures."""
    measured = [run for run in runs if run.results.rows]
    said = [f"{line}." for line in told_once(line for run in measured for line in run.results.remarks)]
    grids = {run.name: sorted({row.temperature for row in run.results.rows if not row.matched_to}) for run in measured}
    if len({tuple(grid) for grid in grids.values()}) > 1:
        text = "; ".join(f"{name} {listed([f'{value:g}' for value in grid])}" for name, grid in grids.items() if grid)
        return [*said, f"The runs were measured at different temperatures, and the best is the best of these: {text}."]
    return said


def record_of(run: Run, runs: Sequence[Run]) -> Json:
    """How one run was made and measured: method, start, steps and time, `config.json`, `results.json` but its rows."""
    items: Json = {"method": run.method}
    if start_text(run, runs):
        items["started from"] = str(run.config["init"])
    if run.metrics:
        items["last step"] = f"{run.metrics[-1]['step']:,}"
        if "time" in run.metrics[-1]:
            items["training time"] = f"{run.metrics[-1]['time'] / 60:.1f} min"
    return {**items, "configuration": run.config, "results": run.results.provenance}


def shows_openmoji(named: object) -> bool:
    """Whether these names of data, tokenizers and recipes are of OpenMoji, or of scenes of its emoji: the licence asks
    for attribution."""
    return re.search(r"openmoji|['\"](?:[a-z]+-)*scenes(?:[:-][\w:?=-]*)?['\"]", str([named]).lower()) is not None
