"""What the page knows of a run folder, as plain records, and which runs of a page began or control others."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from consonar.evaluation.results import Measurement
from consonar.json_types import JsonMap
from consonar.metrics import decides
from consonar.training.objectives import Method, Settings

NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?\b")
"""In a remark; digits of a name (`inception-v3`, `run-0`) are none."""


@dataclass(frozen=True)
class ResultRow:
    """What one sampler setting of one run scored."""

    temperature: float
    num_samples: int
    metrics: Mapping[str, Measurement]
    guidance_scale: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples: Path | None = None
    samples_sha256: str | None = None
    matched_to: str | None = None
    """Folder name of the run whose teacher-forced entropy this temperature was chosen to reach."""
    matched_sha256: str | None = None
    """Of that run's weights."""

    @property
    def sampler(self) -> tuple[float, int, float]:
        """Everything but the temperature: rows that share it lie on one curve."""
        return (self.guidance_scale, self.top_k, self.top_p)

    @property
    def sampler_text(self) -> str:
        """ "guidance 2, top-k 100": what of the sampler is not plain."""
        guidance, top_k, top_p = self.sampler
        parts = {f"guidance {guidance:g}": guidance != 1, f"top-k {top_k}": top_k, f"top-p {top_p:g}": top_p != 1}
        return ", ".join(part for part, said in parts.items() if said)

    @property
    def deciding(self) -> Measurement | None:
        """The number by which runs are judged."""
        return next((measured for name, measured in self.metrics.items() if decides(name)), None)


@dataclass(frozen=True)
class Results:
    """`results.json`: rows over a sampler grid, which of them is best, and where the numbers come from."""

    schema: Literal[1] = 1
    rows: Annotated[tuple[ResultRow, ...], Field(min_length=1)] = ()
    best: int | None = None
    noise_floor: Mapping[str, Measurement] = field(default_factory=dict)
    """Distances of real held-out images to the training images."""
    remarks: tuple[str, ...] = ()
    provenance: JsonMap = field(default_factory=dict)
    """All of the file but rows and remarks."""

    @property
    def best_row(self) -> ResultRow | None:
        return None if self.best is None else self.rows[self.best]

    @property
    def shown(self) -> ResultRow | None:
        """The row whose samples are shown: the best, or that at temperature 1 where none is called so."""
        return self.best_row or self.temperature_one

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
    config: JsonMap
    objective: Settings
    """The configuration's objective, with the defaults of what it lacks; empty where there is none."""
    row: Method | None = None
    """What the table of methods says of it; None for a kind that is not in there."""
    metrics: tuple[JsonMap, ...] = ()
    results: Results = Results()
    """Without rows where nothing was measured, or may be shown."""
    reconstruction: JsonMap = field(default_factory=dict)
    start: Path | None = None
    """The run folder, or whatever else, that the model lies in which this run trained on."""
    starts_from_best: bool = False
    """Whether that is the best model of that run rather than its last one."""
    origin: JsonMap = field(default_factory=dict)
    """What it was made of, as training found it."""
    weights_sha256: str | None = None
    withheld: tuple[str, ...] = ()
    """Sentences on what was measured and is not shown, and why."""
    stopped: JsonMap = field(default_factory=dict)
    """{"step", "reason"} of a run that its guard ended."""
    best_model: JsonMap = field(default_factory=dict)
    """{"step", "metric", "value"} of the model that is kept in best/."""

    def series(self, key: str) -> list[tuple[int, float]]:
        """All logged (step, value) of one metric, without those that were not finite."""
        return [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]

    @property
    def post_trains(self) -> bool:
        """Whether this trained a finished generator on."""
        return self.row is not None and self.row.run == "post-training"

    @property
    def is_control(self) -> bool:
        """Whether other methods of its kind of run are judged by it."""
        return self.row is not None and self.row.is_control

    @property
    def method(self) -> str:
        """ "reAR", "VA-pi (rloo)"; for what is not in the table the kind that its own record names."""
        if self.row is None:
            return str(self.objective.get("kind", "run"))
        details = self.row.details(self.objective)
        return f"{self.row.name} ({', '.join(details)})" if details else self.row.name


def held_out_of(config: JsonMap, origin: JsonMap) -> tuple[str, str]:
    """What tells the held-out data of a run's validation from those of others, by content where that is known; and
    what they are called."""
    data = known if isinstance(known := config.get("data"), Mapping) else {}
    split, items = data.get("validation_split"), data.get("validation_items")
    tokens = data.get("validation_tokens")
    if tokens is None:  # left open: those beside
        tokens = ",".join(f"{path}-validation" for path in str(data.get("tokens") or "").split(",") if path)
    place = tokens or f"{data.get('images')}{f' ({split})' if split else ''}"
    codec = origin.get("tokenizer_fingerprint") or config.get("tokenizer")
    key = str([origin.get("validation_sha256") or place, codec, items])
    return key, f"up to {items:,} of {place}" if isinstance(items, int) else place


def find_start(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on this page that `run` started from, its last model or its best one."""
    if run.start is None:
        return None
    # Runs that were moved together, to another folder or machine, still lie side by side.
    places = [run.start] if run.start.exists() else [run.start, run.path.parent / run.start.name]
    return next((other for place in places for other in runs if other is not run and other.path == place), None)


def measured_start(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on this page whose last model `run` started from: of best models the page has no numbers."""
    return None if run.starts_from_best else find_start(run, runs)


def start_text(run: Run, runs: Sequence[Run]) -> str:
    """Name of what the run started from, as it is called on this page; "" for a run from random weights."""
    init = str(run.config.get("init") or "")
    if run.start is None or init.startswith("hf:"):
        return init
    found = find_start(run, runs)
    return f"{found.name if found else run.start.name}{' (its best model)' if run.starts_from_best else ''}"


def control_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """What `run` would be without its method; None for what is itself the measure, and where the page has none.

    Of post-training the control from the same start, else that start; of training the control, else the first run.
    """
    if run.post_trains:
        controls = [other for other in runs if other.post_trains and other.is_control]
        alike = [one for one in controls if (one.start, one.starts_from_best) == (run.start, run.starts_from_best)]
        return alike[0] if alike and not run.is_control else measured_start(run, runs)
    trained = [other for other in runs if not other.post_trains]
    plain = next((other for other in trained if other.is_control), trained[0])
    return None if plain is run else plain


def find_matched(row: ResultRow, run: Run, runs: Sequence[Run]) -> tuple[Run | None, ResultRow | None]:
    """The run that `row` of `run` was matched to, and what it scored at temperature 1 with the same sampler.

    Of several of one name the one that `run` began; None for what the page does not have.
    """
    found = [other for other in runs if other is not run and other.path.name == row.matched_to]
    other = next(iter([other for other in found if measured_start(other, runs) is run] or found), None)
    rows = other.results.rows if other else ()
    return other, next((o for o in rows if o.temperature == 1 and o.sampler == row.sampler), None)


def measurement_text(measurement: Measurement, *, percent: bool = False) -> str:
    """ "61.2 ± 1.3": two significant digits of the spread set the digits of the value; four without a spread."""
    scale, unit = (100, "\u00a0%") if percent else (1, "")
    value, spread = scale * measurement.value, scale * (measurement.spread or 0.0)
    if not spread or not math.isfinite(spread):
        return f"{value:.4g}{unit}"
    digits = min(4, max(0, 1 - math.floor(math.log10(spread))))
    return f"{value:.{digits}f}\u00a0±\u00a0{spread:.{digits}f}{unit}"


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def told_once(remarks: Iterable[str]) -> list[str]:
    """Each remark once; those that differ in one number alone (a bias drawn by seed) as one, with its range."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for line in dict.fromkeys(remarks):
        kinds.setdefault(tuple(NUMBER.split(line)), []).append(line)
    told = []
    for (first, *texts), lines in kinds.items():
        columns = zip(*map(NUMBER.findall, lines), strict=True)
        ranges = [sorted(set(each), key=lambda text: float(text.replace(",", ""))) for each in columns]
        if sum(len(each) > 1 for each in ranges) > 1:  # of other things, not one drawn anew
            told += lines
        else:
            numbers = (" to ".join(dict.fromkeys([each[0], each[-1]])) for each in ranges)
            told.append(first + "".join(number + text for number, text in zip(numbers, texts, strict=True)))
    return told
