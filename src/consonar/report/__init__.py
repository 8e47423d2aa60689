"""The report: one self-contained HTML page about one to six runs.

This file reads run folders and is the entry point; `page` computes what is said, `charts` and `images` draw, the
template holds the explanations and the design. No number comes from outside the run folders, so two calls give the same
bytes.

A run folder holds `config.json`, and any of `metrics.jsonl`, `results.json` (schema 1) with its `samples_*.npz`,
`reconstructions.npz`, `reconstruction.json` and `samples/step_*.png`. What is missing is left out of the page; what is
there and broken is a `UserError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consonar.checkpoint import write_atomically
from consonar.errors import UserError

MAX_RUNS = 6
RESULTS_SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """One number of `results.json`; `spread` is its standard deviation over disjoint parts of the samples, or None."""

    value: float
    spread: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """What one sampler setting of one run scored."""

    temperature: float
    num_samples: int
    metrics: Mapping[str, Measurement]
    guidance_scale: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    samples: Path | None = None

    @property
    def sampler(self) -> tuple[float, int, float]:
        """Everything but the temperature: rows that share it lie on one curve."""
        return (self.guidance_scale, self.top_k, self.top_p)

    @property
    def held_out_fd(self) -> Measurement | None:
        """The Fréchet distance to the held-out images, whichever feature network measured it."""
        for name, measurement in self.metrics.items():
            if name.startswith("FD(") and name.endswith(" validation"):
                return measurement
        return None


@dataclass(frozen=True)
class Results:
    """`results.json`: rows over a sampler grid, the index of the best one, and where the numbers come from."""

    rows: tuple[ResultRow, ...]
    best: int | None
    provenance: Mapping[str, Any]

    @property
    def best_row(self) -> ResultRow | None:
        return None if self.best is None else self.rows[self.best]

    @property
    def noise_floor(self) -> float | None:
        """The Fréchet distance of the real held-out images themselves to the training images, where it was measured."""
        floors = self.provenance.get("noise_floor", {})
        return next((float(entry["value"]) for name, entry in floors.items() if name.startswith("FD(")), None)

    @property
    def temperature_one(self) -> ResultRow | None:
        """The plainest row at temperature 1: without guidance or truncation where that was measured."""
        rows = [row for row in self.rows if row.temperature == 1]
        return min(rows, key=lambda row: row.sampler != (1.0, 0, 1.0), default=None)


@dataclass(frozen=True)
class Run:
    """One run folder, read and checked; pictures stay on disk until the page needs them."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...] = ()
    results: Results | None = None
    reconstruction: Mapping[str, float] = field(default_factory=dict)

    def last(self, key: str) -> tuple[int, float] | None:
        """The last logged (step, value) of one metric, or None where it was never logged as a finite number."""
        found = ((line["step"], line[key]) for line in reversed(self.metrics) if line.get(key) is not None)
        return next(found, None)

    @property
    def method(self) -> str:
        """What the run trained, read off what it logged: a noise setting that never fires is not noise.

        "plain AR", "reAR", one of its halves, "tokenizer", or the objective's own name for anything else.
        """
        logged = {key for line in self.metrics for key in line}
        objective = self.config.get("objective", {})
        if logged & {"train/mse", "validation/psnr"}:
            return "tokenizer"
        if "embedding_weight" not in objective or not logged:
            return str(objective.get("kind", "run"))
        noisy = any(line.get("train/noise_rate", 0) > 0 for line in self.metrics)
        aligned = objective["embedding_weight"] > 0
        return {
            (False, False): "plain AR",
            (True, True): "reAR",
            (True, False): "noisy context only",
            (False, True): "codebook alignment only",
        }[noisy, aligned]


def measurement_text(measurement: Measurement, *, percent: bool = False) -> str:
    """ "61.2 ± 1.3": two significant digits of the spread set the digits of the value; four without a spread."""
    scale, unit = (100, "\u00a0%") if percent else (1, "")
    value, spread = scale * measurement.value, scale * (measurement.spread or 0.0)
    if not spread or not math.isfinite(spread):
        return f"{value:.4g}{unit}"
    digits = min(4, max(0, 1 - math.floor(math.log10(spread))))
    return f"{value:.{digits}f}\u00a0±\u00a0{spread:.{digits}f}{unit}"


def spread_of_difference(first: Measurement, second: Measurement) -> float | None:
    """sqrt(a^2 + b^2) of the two spreads, or None where either was not measured."""
    if not first.spread or not second.spread:
        return None
    return math.hypot(first.spread, second.spread)


def verdict(first: Measurement, second: Measurement) -> str:
    """How sure the difference of two measurements is: "within", "hint", "clear", or "open" without a spread."""
    spread = spread_of_difference(first, second)
    if spread is None:
        return "open"
    size = abs(first.value - second.value)
    return "within" if size <= spread else "hint" if size <= 2 * spread else "clear"


def write_report(runs: Sequence[Path], out: Path, *, title: str | None = None, overwrite: bool = False) -> Path:
    """Write one HTML page that compares 1 to 6 runs, and return its path.

    The page needs no network and no script. It is written under a temporary name and renamed, so that a failure leaves
    no half page. Raises `UserError` for a wrong number of runs, a missing or broken run folder, and an `out` that
    exists (unless `overwrite`).
    """
    from consonar.report.page import render

    out = Path(out)
    if out.is_dir():
        raise UserError(f"out {out}: is a folder; name a file, for example {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise UserError(f"out {out}: already exists; choose another name, or overwrite it (--overwrite)")
    html = render(load_runs(runs), title=title)
    write_atomically(out, lambda partial: partial.write_text(html, encoding="utf-8"))
    return out


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read 1 to 6 run folders, in the given order, and name each by its folder (with its parent's where two agree).

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
    return [_load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _load_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"run {folder}: no such folder; pass a folder that `consonar train` wrote")
    if not (folder / "config.json").is_file():
        raise UserError(f"run {folder}: holds no config.json; pass a folder that `consonar train` wrote")
    results_path, reconstruction_path = folder / "results.json", folder / "reconstruction.json"
    return Run(
        path=folder,
        name=name,
        config=_read_object(folder / "config.json"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        results=_read_results(results_path) if results_path.is_file() else None,
        reconstruction=_read_object(reconstruction_path) if reconstruction_path.is_file() else {},
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again or leave this run out") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected an object with named entries")
    return value


def _read_metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    lines: list[Mapping[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not valid JSON; remove the line if writing was cut off") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{path} line {number}: {text[:60]!r} is not an object with an integer 'step'")
        lines.append(line)
    return tuple(lines)


def _read_results(path: Path) -> Results:
    content = _read_object(path)
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
    return Results(rows=rows, best=best, provenance={k: v for k, v in content.items() if k not in ("rows", "best")})


def _read_row(path: Path, number: int, row: Mapping[str, Any]) -> ResultRow:
    try:
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
            samples=path.parent / row["samples"] if row.get("samples") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: rows[{number}] is incomplete ({type(error).__name__}: {error}); "
            "expected temperature, num_samples and metrics with a value each"
        ) from error
    if result.samples is not None and not result.samples.is_file():
        raise UserError(f"{path}: rows[{number}] names {result.samples.name}, which is not there; sample again")
    return result
