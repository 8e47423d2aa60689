"""Tables of the page: who is ahead of its control, what was measured, how training went, the configurations.

Ahead or behind is what lies beyond twice the spread of the difference, sqrt(a^2 + b^2) for independent draws; the rest
is no difference. The spread covers drawing again, never training again.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from consonar.evaluation.results import Measurement
from consonar.json_types import Json
from consonar.metrics import in_order, metric_of
from consonar.report.charts import curve_charts
from consonar.report.records import (
    ResultRow,
    Run,
    control_of,
    find_matched,
    held_out_of,
    listed,
    measured_start,
    measurement_text,
)
from consonar.training.origins import flat

Entry = tuple[Run, ResultRow]


class Verdict(NamedTuple):
    """ "ahead", "no difference", "behind", "open" or, for what was not measured, "–"; and by how much or why."""

    word: str
    text: str = ""


UNMEASURED = Verdict("–")


def judge(score: Measurement | None, base: Measurement | None, direction: int = -1) -> Verdict:
    """A number against that of the control; `direction` is -1 where lower is better."""
    if score is None or base is None:
        return UNMEASURED
    gain = direction * (score.value - base.value)
    if not math.isfinite(gain):
        return Verdict("open", "not a finite number")
    if score.spread is None or base.spread is None:
        side = "higher" if gain * direction > 0 else "lower"
        text = f"{abs(gain):.3g} {side}, but no spread was measured" if gain else "equal, without a spread"
        return Verdict("open", text)
    spread = math.hypot(score.spread, base.spread)
    word = "no difference" if abs(gain) <= 2 * spread else "ahead" if gain > 0 else "behind"
    return Verdict(word, measurement_text(Measurement(abs(gain), spread)))


def verdict_table(runs: Sequence[Run]) -> tuple[list[str], list[dict[str, Any]]]:
    """Settings that were measured, and {"run", "control", setting: Verdict} of each run that has a measured control."""
    scored = [run for run in runs if any(row.deciding for row in run.results.rows)]
    found: list[dict[str, Any]] = []
    for run, control in [(run, control_of(run, scored)) for run in scored]:
        if control is not None:
            pairs = {
                "at its best T": (run.results.best_row, control.results.best_row),
                "at T 1": (run.results.temperature_one, control.results.temperature_one),
                "at equal entropy": rows_of_equal_entropy(run, scored),
            }
            verdicts = {key: judge(a.deciding, b.deciding) if a and b else UNMEASURED for key, (a, b) in pairs.items()}
            found.append({"run": run, "control": control.name, **verdicts})
    settings = [key for key in (found[0] if found else ()) if key not in ("run", "control")]
    return [key for key in settings if any(row[key] != UNMEASURED for row in found)], found


def rows_of_equal_entropy(run: Run, runs: Sequence[Run]) -> tuple[ResultRow | None, ResultRow | None]:
    """A post-trained run at temperature 1, and its start at the temperature of the same entropy."""
    start = measured_start(run, runs) if run.post_trains else None
    matched = [(find_matched(row, start, runs), row) for row in start.results.rows] if start else []
    return next(((trained, row) for (other, trained), row in matched if other is run), (None, None))


def result_sections(runs: Sequence[Run], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The numbers: at temperature 1, at each run's own best setting, at equal entropy, and last the whole grid.

    [{"title", "rows": [{"run", "row", "cells": [{"text", "mark"}]}]}]: the mark "best" is the best of its column in
    the section, "close" what is no different from it.
    """
    entries: dict[str, list[Entry]] = {
        "At temperature 1": [(run, row) for run in runs if (row := run.results.temperature_one)],
        "Each at its own best temperature": [(run, row) for run in runs if (row := run.results.best_row)],
        **{f"{run.name} at the entropy of others": matched_entries(run, runs) for run in runs},
        "Everything measured": [(run, row) for run in runs for row in run.results.rows],
    }
    return [{"title": title, "rows": table_rows(found, columns)} for title, found in entries.items() if found]


def matched_entries(run: Run, runs: Sequence[Run]) -> list[Entry]:
    """The temperature control: each run that `run` was matched to, at temperature 1, above the row matched to it."""
    entries: list[Entry] = []
    for row in [row for row in run.results.rows if row.matched_to]:
        other, trained = find_matched(row, run, runs)
        entries += [(other, trained), (run, row)] if other and trained else [(run, row)]
    return entries


def table_rows(entries: Sequence[Entry], columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"run": run, "row": row, "cells": []} for run, row in entries]
    for column in columns:
        metric = metric_of(column)
        measured = [row.metrics.get(column) for _, row in entries]
        present = [each for each in measured if each is not None]
        # Where all are equal there is no best to point at.
        differ = metric.direction and len({each.value for each in present}) > 1
        best = max(present, key=lambda each: metric.direction * each.value) if differ else None
        for each, row in zip(measured, rows, strict=True):
            mark = ""
            if each and best:
                close = judge(each, best, metric.direction).word == "no difference"
                mark = "best" if each.value == best.value else "close" if close else ""
            text = measurement_text(each, percent=metric.unit == "%") if each else ""
            row["cells"].append({"text": text, "mark": mark})
    return rows


def training_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How training went, of the runs that took a finished generator further and of the others: they differ in length.

    [{"title", "indices" of the runs, "columns": [metric], "notes", "charts"}].
    """
    groups = []
    for title, post_trains in (("Post-training", True), ("Training", False)):
        entries = {index: run for index, run in enumerate(runs) if run.post_trains == post_trains and run.metrics}
        keys = in_order({key for run in entries.values() for line in run.metrics for key in line if "/" in key})
        columns = [key for key in keys if key.startswith("validation/")]
        notes, charts = training_notes([*entries.values()]), curve_charts(entries, keys)
        if entries:
            groups.append({"title": title, "indices": [*entries], "columns": columns, "notes": notes, "charts": charts})
    return groups


def from_to(run: Run, key: str) -> str:
    """ "-0.5120 → -0.4983": the value at step 0, where it was logged, and the last one, to equal places."""
    series = run.series(key)
    if not series:
        return "–"
    values = [value for _, value in (series[:1] if series[0][0] == 0 < series[-1][0] else []) + series[-1:]]
    largest = max(abs(value) for value in values)
    places = 4 if largest == 0 else min(4, max(0, 3 - math.floor(math.log10(largest))))
    return " → ".join(f"{value:.{places}f}".replace("-", "\u2212") for value in values)


def training_notes(runs: Sequence[Run]) -> list[str]:
    """How runs ended, and what must be known to read the charts."""
    notes = []
    for run in [run for run in runs if run.stopped]:
        last, step = run.metrics[-1]["step"], run.stopped["step"]
        later = f" It was resumed later, to step {last:,}." if last > step else ""
        notes.append(f"{run.name} was stopped by its guard at step {step:,}: {run.stopped['reason']}.{later}")
    if metrics := dict.fromkeys(run.best_model["metric"] for run in runs if run.best_model):
        of: dict[str, list[str]] = {}
        for run in runs:
            if "protocol" in run.best_model:
                of.setdefault(run.best_model["protocol"], []).append(run.name)
        measured = [
            f" {f'{listed(names)} is m' if len(of) > 1 else 'M'}easured on {text}." for text, names in of.items()
        ]
        notes.append(
            f"The best step is that of the best {listed(list(metrics))} on the way (ringed below; step 0 is the start "
            f"model). That model is in best/; everything else on this page is about the last one.{''.join(measured)}"
        )
    validated = {
        run.name: held_out_of(run.config, run.origin)
        for run in runs
        if any(key.startswith("validation/") for line in run.metrics for key in line)
    }
    if len(dict(validated.values())) > 1:
        listing = "; ".join(f"{name} {text}" for name, (_, text) in validated.items())
        notes.append(f"Validation is not of the same held-out data and tokens, and does not compare: {listing}.")
    if len({str(run.objective.get("rewards")) for run in runs}) > 1:
        notes.append("The weights of the rewards differ between runs: compare the parts, not the sum.")
    if noisy := [run.name for run in runs if any(value > 0 for _, value in run.series("train/noise_rate"))]:
        notes.append(f"Training values of {listed(noisy)} are under a noisy context; validation never is.")
    return notes


def compared(runs: Sequence[Run], records: Sequence[Json]) -> list[dict[str, Any]]:
    """A record of each run: what differs between runs and what is the same, [{"title", "headings", "rows"}].

    A row is (dotted key, values), a value for each heading.
    """
    texts = [{key: text_of(value) for key, value in flat(record, "")} for record in records]
    keys = dict.fromkeys(key for one in texts for key in one)
    rows = [(key, [one.get(key, "not set") for one in texts]) for key in keys]
    differs = [(key, values) for key, values in rows if len(set(values)) > 1]
    same = [(key, values[:1]) for key, values in rows if len(set(values)) == 1]
    tables = (
        ("What differs between the runs", [run.name for run in runs], differs),
        ("What is the same" if len(runs) > 1 else "Everything", ["value"], same),
    )
    return [{"title": title, "headings": headings, "rows": rows} for title, headings, rows in tables if rows]


def text_of(value: object) -> str:
    """A text as it is; else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
