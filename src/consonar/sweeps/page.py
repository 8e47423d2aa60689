"""The tables of a sweep, as Markdown and as one self-contained page, with the report's charts and style."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from consonar.files.writers import write_atomically
from consonar.json_types import Json, JsonMap
from consonar.metrics import meanings, metric_of
from consonar.report import filled, write_page
from consonar.report.charts import frontier_charts
from consonar.report.records import ResultRow, Results, Run
from consonar.report.tables import compared
from consonar.sweeps.plan import Sweep
from consonar.sweeps.summary import TRAINING, Setting, Summary, difference_cells, over_seeds, summarise, value_cells
from consonar.training.objectives import completed, method_of

MARKDOWN, PAGE = "sweep.md", "sweep.html"
HOW_TO_READ = (
    "“±” behind a value is the standard deviation over seeds, behind a difference the standard error of its mean; "
    "differences are taken seed by seed, n of them; between a run and one of the other row that it started from, "
    "whatever their seeds: where that is one for all, “±” is of post-training alone and knows no other start; against "
    "that one itself it also lacks what training and drawing it again would do, and there is no verdict. Ahead or "
    "behind is what lies beyond the 95 % quantile of Student's t (12.7 standard errors for two seeds, 4.3 for three, "
    "2.8 for five); nothing corrects for the number of comparisons."
)


def write_summary(sweep: Sweep, results: Mapping[str, Json], out: Path) -> Path:
    """Writes OUT/sweep.md and OUT/sweep.html, and returns the latter; the same results give the same bytes."""
    summary = summarise(sweep, results)
    text = markdown(summary)
    write_atomically(out / MARKDOWN, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_page(page(summary, results), out / PAGE)
    return out / PAGE


def about(summary: Summary) -> str:
    """What was done, in a sentence."""
    cells = summary.sweep.cells.values()
    seeds = len({cell.seed for cell in cells})
    measured = dict.fromkeys(
        f"{cell.evaluated.settings.num_samples:,} samples a temperature, measured against {cell.evaluated.reference}"
        for cell in cells
    )
    return (
        f"{len(summary.sweep.rows)} rows, {len(cells)} runs, up to {seeds} seed{'s' * (seeds > 1)} each; "
        f"{', or '.join(measured)}."
    )


def markdown(summary: Summary) -> str:
    """The tables as text."""
    lines = [f"# {summary.sweep.name}", "", about(summary), "", HOW_TO_READ, ""]
    titles, verdicts = summary.verdicts()
    if verdicts:
        lines += [f"## {summary.deciding}: who is ahead of {summary.sweep.compare_with}", ""]
        cells = {row: [f"{one.word} {one.text}".strip() for one in found] for row, found in verdicts.items()}
        lines += [*table(titles, cells), "", *protocol_lines(summary)]
    for setting in summary.settings:
        headings = [metric_of(name).heading for name in setting.columns]
        values = {named(row, setting): value_cells(setting, row, setting.columns) for row in setting.values}
        lines += [f"## {setting.title.capitalize()}", "", *table(headings, values), ""]
        if differences := difference_rows(setting):
            lines += ["Differences:", "", *table(headings, differences), ""]
        lines += protocol_lines(summary, training=setting.title == TRAINING)
    lines += [f"- {note}" for note in summary.notes]
    return "\n".join(lines).rstrip() + "\n"


def protocol_lines(summary: Summary, *, training: bool = False) -> list[str]:
    """What the numbers of a table above are of."""
    known = summary.validations if training else summary.protocols
    return [text for line in known.lines for text in (line, "")]


def table(headings: list[str], rows: Mapping[str, list[str]]) -> list[str]:
    """A table in Markdown."""
    cells = [["row", *headings], ["---"] * (len(headings) + 1), *([row, *found] for row, found in rows.items())]
    return [f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in cells]


def named(row: str, setting: Setting) -> str:
    """A row with what is said of it."""
    return f"{row} ({setting.notes[row]})" if row in setting.notes else row


def difference_rows(setting: Setting, columns: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Every row that is compared, by what it is called; `columns`: the metrics (None: all, in their order)."""
    return {
        f"{row} − {setting.base[row]}": difference_cells(setting, row, setting.columns if columns is None else columns)
        for row in setting.values
        if setting.differences(row)
    }


def page(summary: Summary, results: Mapping[str, Json]) -> str:
    """The page as one string of HTML."""
    sweep = summary.sweep
    runs = [run_of(row, summary, results) for row in sweep.rows]
    titles, verdicts = summary.verdicts()
    return filled(
        "sweep.html.jinja",
        runs=runs,
        title=f"{sweep.name}: {len(sweep.rows)} rows over seeds",
        about=about(summary),
        how_to_read=HOW_TO_READ,
        legends=[", ".join(filter(None, (run.method, summary.protocols.name(run.name)))) for run in runs],
        deciding=summary.deciding,
        base=sweep.compare_with,
        titles=titles,
        verdicts=[(run, verdicts[run.name]) for run in runs if run.name in verdicts],
        frontier=[
            one._replace(note=one.note.replace("the spread", "the deviation over seeds"))
            for one in frontier_charts(runs)
        ],
        sections=[
            {
                "title": setting.title,
                "columns": setting.columns,
                "rows": {named(row, setting): value_cells(setting, row, setting.columns) for row in setting.values},
                "differences": difference_rows(setting),
                "protocols": (summary.validations if setting.title == TRAINING else summary.protocols).lines,
            }
            for setting in summary.settings
        ],
        meaning=meanings({name: None for setting in summary.settings for name in setting.columns}),
        notes=summary.notes,
        protocols=summary.protocols.lines,
        records=compared(runs, [dict(run.config) for run in runs]),
        results={name: origin_of(result) for name, result in results.items()},
    )


def run_of(row: str, summary: Summary, results: Mapping[str, Json]) -> Run:
    """A row as the report knows runs: means over seeds, their deviation as the spread."""
    cell = next(cell for cell in summary.sweep.cells.values() if cell.row == row)
    config = results[cell.name]["asked"]["config"]
    objective = completed(config["objective"])
    count, rows = cell.evaluated.settings.num_samples, []
    for setting in summary.settings:
        if setting.temperature is not None and row in setting.values:
            metrics = {name: over_seeds(values) for name, values in setting.values[row].items()}
            rows.append(ResultRow(setting.temperature, count, metrics, setting.guidance))
        for other, at in setting.base.items():
            if at.startswith(f"{row} at the entropy of "):
                metrics = {name: over_seeds(values) for name, values in setting.values[at].items()}
                rows.append(ResultRow(metrics["temperature"].value, count, metrics, matched_to=other))
    settings = {key: value for key, value in config.items() if key not in ("recipe", "seed")}
    return Run(Path(row), row, settings, objective, method_of(objective), results=Results(rows=tuple(rows)))


def origin_of(result: JsonMap) -> list[str]:
    """Of a cell: the beginnings of the hashes of its configuration and of its weights, machine and torch."""
    if result["failure"]:
        return [result["config_sha256"][:12], "–", "–", result["versions"]["torch"]]
    measured = result["results"]
    return [result["config_sha256"][:12], result["weights"][:12], measured["machine"], result["versions"]["torch"]]
