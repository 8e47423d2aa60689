"""Reads run folders into records. What is missing stays empty; what is there and broken is a `UserError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from consonar.errors import UserError, reading
from consonar.evaluation.run_results import weights_sha256
from consonar.files.readers import beside, read_json
from consonar.files.writers import file_sha256
from consonar.report.records import Measurement, ResultRow, Results, Run
from consonar.report.validity import comparable, without_old_matches, without_outdated
from consonar.training.objectives import method_of
from consonar.training.tracking import read_metrics

MAX_RUNS = 8
RESULTS_SCHEMA = 1


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read 1 to 8 run folders, in the given order, and name each by its folder (with its parent's where two agree).

    Results of weights that have changed since, and results that cannot be compared with those of the first run, are
    left out; `withheld` says so.
    Raises `UserError` for another number, for one folder given twice, and for what is missing or broken in one.
    """
    if not 1 <= len(paths) <= MAX_RUNS:
        raise UserError(f"runs: {len(paths)} given; a report compares 1 to {MAX_RUNS} run folders")
    folders = [Path(path).resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"runs: {folder} is given more than once; name each run folder once")
    short = [folder.name for folder in folders]
    names = [f.name if short.count(f.name) == 1 else f"{f.parent.name}/{f.name}" for f in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [without_outdated(_load_run(folder, name)) for folder, name in zip(folders, names, strict=True)]
    return comparable([without_old_matches(run, runs) for run in runs])


def _load_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"run {folder}: no such folder; pass a folder that `consonar train` wrote")
    if not (folder / "config.json").is_file():
        raise UserError(f"run {folder}: holds no config.json; pass a folder that `consonar train` wrote")
    config = _object(folder / "config.json")
    for key, kind in (("objective", dict), ("init", str)):
        if not isinstance(config.get(key), (kind, NoneType)):
            raise UserError(
                f"{folder / 'config.json'}: {key} is {str(config[key])[:60]!r}; expected as training writes it"
            )
    with reading(f"{folder / 'config.json'}: objective", "settings as training writes them"):
        method_of(config.get("objective") or {})
    results_path = folder / "results.json"
    return Run(
        path=folder,
        name=name,
        config=config,
        metrics=tuple(read_metrics(folder / "metrics.jsonl")),
        results=_read_results(results_path) if results_path.is_file() else None,
        reconstruction=_read_note(folder / "reconstruction.json") or {},
        weights_sha256=weights_sha256(folder),
        stopped=_read_note(folder / "stopped.json", step=int, reason=str),
        best_model=_read_note(folder / "best.json", step=int, metric=str, value=(int, float)),
    )


def _read_note(path: Path, **entries: Any) -> dict[str, Any] | None:
    """A small file of named entries of given types, or None where it is not there."""
    if not path.is_file():
        return None
    note = _object(path)
    for key, kind in entries.items():
        if not isinstance(note.get(key), kind):
            raise UserError(f"{path}: {key} is {note.get(key)!r}; expected {', '.join(entries)}, as training writes it")
    return note


def _object(path: Path) -> dict[str, Any]:
    return read_json(path, "write it again or leave this run out")


def _read_results(path: Path) -> Results:
    content = _object(path)
    if content.get("schema") != RESULTS_SCHEMA:
        raise UserError(
            f"{path}: schema {content.get('schema')!r}; this version reads schema {RESULTS_SCHEMA}: evaluate again"
        )
    if not isinstance(content.get("rows"), list) or not content["rows"]:
        raise UserError(f"{path}: rows is {content.get('rows')!r:.60}; expected a list with at least one row")
    rows = tuple(_read_row(path, number, row) for number, row in enumerate(content["rows"]))
    best = content.get("best")
    if best is not None and not (isinstance(best, int) and 0 <= best < len(rows)):
        raise UserError(f"{path}: best is {best!r}; expected the index of a row, 0 to {len(rows) - 1}")
    with reading(f"{path}: noise_floor", "a table of metrics with a value each"):
        for entry in content.get("noise_floor", {}).values():
            float(entry["value"])
    remarks = content.get("remarks", [])
    if not isinstance(remarks, list) or not all(isinstance(remark, str) for remark in remarks):
        raise UserError(f"{path}: remarks is {str(remarks)[:60]!r}; expected a list of texts")
    return Results(rows=rows, best=best, provenance={k: v for k, v in content.items() if k not in ("rows", "best")})


def _read_row(path: Path, number: int, row: Mapping[str, Any]) -> ResultRow:
    expected = "a row with temperature, num_samples and metrics with a value each"
    with reading(f"{path}: rows[{number}]", expected):
        measured = {
            name: Measurement(float(entry["value"]), None if entry.get("spread") is None else float(entry["spread"]))
            for name, entry in row["metrics"].items()
        }
        result = ResultRow(
            temperature=float(row["temperature"]),
            num_samples=int(row["num_samples"]),
            metrics=measured,
            guidance_scale=float(row.get("guidance_scale", 1.0)),
            top_k=int(row.get("top_k", 0)),
            top_p=float(row.get("top_p", 1.0)),
            seed=row.get("seed"),
            samples=path.parent / beside(path, row["samples"]) if row.get("samples") else None,
            matched_to=str(row["matched_to"]) if row.get("matched_to") else None,
            matched_sha256=str(row["matched_sha256"]) if row.get("matched_sha256") else None,
        )
    if result.samples is not None and not result.samples.is_file():
        raise UserError(f"{path}: rows[{number}] names {result.samples.name}, which is not there; sample again")
    if result.samples is not None and row.get("samples_sha256") not in (None, file_sha256(result.samples)):
        raise UserError(f"{path}: {result.samples.name} is not the file that rows[{number}] measured; evaluate again")
    return result
