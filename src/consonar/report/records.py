"""What the report knows of a run folder, as plain records, and how two measurements are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consonar.training.objectives import Settings, completed, method_of

COMPONENTS = ("model", "best")
"""Folders inside a run that another run can start from."""


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
    matched_to: str | None = None
    """Folder name of the run whose teacher-forced entropy this temperature was chosen to reach."""
    matched_sha256: str | None = None
    """Of that run's weights."""

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
    reconstructs: bool = True
    """Whether the pictures in `reconstructions.npz` are of the tokenizer that the run has now."""
    weights_sha256: str | None = None
    withheld: tuple[str, ...] = ()
    """Sentences on what was measured and is not shown, and why."""
    stopped: Mapping[str, Any] | None = None
    """{"step", "reason"} of a run that its guard ended."""
    best_model: Mapping[str, Any] | None = None
    """{"step", "metric", "value"} of the model that is kept in best/."""

    def series(self, key: str) -> list[tuple[int, float]]:
        """All logged (step, value) of one metric, without those that were not finite."""
        return [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]

    def last(self, key: str) -> tuple[int, float] | None:
        """The last logged (step, value) of one metric, or None where it was never logged as a finite number."""
        return next(reversed(self.series(key)), None)

    @property
    def objective(self) -> Settings:
        """The configuration's objective; empty where it has none."""
        return completed(self.config.get("objective") or {})

    @property
    def post_trains(self) -> bool:
        """Whether this trained a finished generator on."""
        row = method_of(self.objective)
        return row is not None and row.run == "post-training"

    @property
    def is_control(self) -> bool:
        """Whether other methods of its kind of run are judged by it."""
        row = method_of(self.objective)
        return row is not None and row.is_control

    @property
    def method(self) -> str:
        """ "reAR", "VA-pi (rloo)": by its row in `METHODS`; for what has none there the kind that its record names."""
        row = method_of(self.objective)
        if row is None:
            return str(self.objective.get("kind", "run"))
        details = row.details(self.objective)
        return f"{row.name} ({', '.join(details)})" if details else row.name


def start_of(run: Run) -> tuple[Path | None, bool]:
    """The run folder that `init` lies in, or `init` itself, and whether it is the best model of that run.

    None for a start from random weights or from a model of the hub.
    """
    init = run.config.get("init")
    if not init or init.startswith("hf:"):
        return None, False
    return Path(init).parent if Path(init).name in COMPONENTS else Path(init), Path(init).name == "best"


def share_start(run: Run, other: Run) -> bool:
    """Whether both runs started from the same model, on this page or not."""
    folder, _ = start_of(run)
    if folder is None:
        return bool(run.config.get("init")) and run.config["init"] == other.config.get("init")
    return start_of(run) == start_of(other)


def run_of_start(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on this page that `run` started from, its last model or its best one."""
    folder, _ = start_of(run)
    if folder is None:
        return None
    found = next((other for other in runs if other.path == folder), None)
    if found is not None or folder.exists():
        return found
    # Runs that were moved together, to another folder or machine, still lie side by side.
    return next((other for other in runs if other is not run and other.path == run.path.parent / folder.name), None)


def find_start(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on this page whose last model `run` started from. A best model is not measured here, so it is None."""
    return None if start_of(run)[1] else run_of_start(run, runs)


def start_text(run: Run, runs: Sequence[Run]) -> str:
    """Name of what the run started from, as it is called on this page; "" for a run from random weights."""
    folder, best = start_of(run)
    if folder is None:
        return str(run.config.get("init") or "")
    found = run_of_start(run, runs)
    return f"{found.name if found else folder.name}{' (its best model)' if best else ''}"


def find_matched(row: ResultRow, run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on this page that `row` of `run` was matched to; of several of one name the one that `run` began."""
    found = [other for other in runs if other is not run and other.path.name == row.matched_to]
    begun = [other for other in found if find_start(other, runs) is run]
    return next(iter(begun or found), None)


def row_of_matched(row: ResultRow, run: Run, runs: Sequence[Run]) -> tuple[Run | None, ResultRow | None]:
    """That run, and what it scored at temperature 1 with the same sampler; None for what the page does not have."""
    other = find_matched(row, run, runs)
    rows = other.results.rows if other and other.results else ()
    return other, next((o for o in rows if o.temperature == 1 and o.sampler == row.sampler), None)


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
    if first.spread is None or second.spread is None:
        return None
    return math.hypot(first.spread, second.spread)


def verdict(first: Measurement, second: Measurement) -> str:
    """How sure the difference of two measurements is: "within", "hint", "clear", or "open" without a spread."""
    spread = spread_of_difference(first, second)
    if spread is None:
        return "open"
    size = abs(first.value - second.value)
    return "within" if size <= spread else "hint" if size <= 2 * spread else "clear"


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
