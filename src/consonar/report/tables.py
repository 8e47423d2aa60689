"""Tables of the report: what was measured, and the configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from consonar.report.charts import direction
from consonar.report.records import ResultRow, Run, measurement_text, row_of_matched, verdict

HEADINGS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "l1": "mean absolute error",
    "num_images": "images measured",
    "usage": "codes used",
    "perplexity": "perplexity",
    "entropy": "entropy of samples (nats)",
    "entropy (teacher-forced)": "entropy under the true context (nats)",
}
Entry = tuple[int, Run, ResultRow]


def result_columns(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One {"metric", "heading", "hint"} per metric that any run measured, in the order of the first file."""
    metrics = dict.fromkeys(name for run in runs if run.results for row in run.results.rows for name in row.metrics)
    hints = {-1: "lower is better", 1: "higher is better", 0: ""}
    # Fréchet distances last would hide the main number on a phone; the held-out one leads.
    first = sorted(metrics, key=lambda name: not (name.startswith("FD(") and name.endswith(" validation")))
    return [{"metric": m, "heading": HEADINGS.get(m, m), "hint": hints[direction(m)]} for m in first]


def result_sections(runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The table: a section at temperature 1, one at each run's own best setting, and the whole grid, folded.

    Each section is {"title", "folded", "rows"}, each row {"index", "run", "row", "cells"}, each cell {"text", "mark"};
    the mark "best" is the best of its column in the section, "close" what the spread does not tell from it.
    """
    measured = [(index, run, run.results) for index, run in enumerate(runs) if run.results]
    at_one = [(i, run, row) for i, run, results in measured if (row := results.temperature_one)]
    best = [(i, run, row) for i, run, results in measured if (row := results.best_row)]
    everything = [(i, run, row) for i, run, results in measured for row in results.rows]
    sections = [
        ("At temperature 1", False, at_one),
        ("Each at its own best temperature", False, best),
        ("Everything measured", True, everything),
    ]
    return [
        {"title": title, "folded": folded, "rows": _table_rows(entries, columns)}
        for title, folded, entries in sections
        if entries
    ]


def control_sections(runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The temperature control: a section as of `result_sections` for every run that has rows matched to others.

    Its rows: the run at temperature 1, then each run that was matched, at temperature 1, above the row matched to it.
    """
    sections = []
    for index, run in enumerate(runs):
        matched = [row for row in run.results.rows if row.matched_to] if run.results else []
        if not matched or run.results is None:
            continue
        start = run.results.temperature_one
        entries: list[Entry] = [(index, run, start)] if start and not start.matched_to else []
        for row in matched:
            other, trained = row_of_matched(row, run, runs)
            if other and trained:
                entries.append((runs.index(other), other, trained))
            entries.append((index, run, row))
        title = f"{run.name} at the entropy of others"
        sections.append({"title": title, "folded": False, "rows": _table_rows(entries, columns)})
    return sections


def _table_rows(entries: Sequence[Entry], columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
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


def config_rows(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """The configurations as [(dotted key, value per run)], split into what "differs" between runs and the "same"."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, "not set") for config in flat]) for key in keys]
    return {
        "differs": [row for row in rows if len(set(row[1])) > 1],
        "same": [row for row in rows if len(set(row[1])) == 1],
    }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"loop": {"steps": 900}} -> {"loop.steps": "900"}: leaves as JSON, lists whole."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
