"""What the cells of a sweep say together: mean and deviation over seeds, and paired comparisons with one row.

A comparison takes the difference at every seed that both rows have, so that what a seed does to both (order of the
data, first weights, random numbers of sampling) leaves it; of a run and what it started from, whatever their seeds.
Its standard error is the deviation of these differences over the root of their number n; ahead or behind is what lies
beyond the two-sided 95 % quantile of Student's t with n - 1 degrees of freedom times that. Nothing corrects for the
number of comparisons. Where all runs of a row have one start the deviation knows nothing of other starts; compared with
that start they get no verdict, for it holds nothing of what training and drawing that one again would do, either.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev

from consonar.evaluation.results import Measurement, setting_text
from consonar.json_types import Json, JsonMap
from consonar.metrics import decides, in_order, metric_of
from consonar.metrics.shares import t_95
from consonar.report.records import held_out_of, listed, measurement_text, told_once
from consonar.report.tables import UNMEASURED, Verdict
from consonar.sweeps.contents import MADE_OF
from consonar.sweeps.plan import Sweep
from consonar.sweeps.protocols import Protocols, measured_as

Values = Mapping[int, float]
"""Seed: value."""
ONE_START = "against one draw of the start"
"""The word of a comparison without a verdict."""
BEST, EQUAL_ENTROPY, TRAINING = "each at its own best temperature", "at equal entropy", "training"


def over_seeds(values: Values) -> Measurement:
    """Mean and, of two or more, standard deviation."""
    found = list(values.values())
    return Measurement(mean(found), stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """Mean of the differences at the seeds that two rows share; `error` is its standard error (None for one seed)."""

    value: float
    error: float | None
    count: int
    one_start: bool = False
    """Whether it is of several runs and of the one that all of them started from, whose own draw `error` lacks."""


def paired(values: Values, base: Values, pairs: Iterable[tuple[int, int]] | None = None) -> Difference | None:
    """`values` less `base` at these pairs of seeds (None: at equal ones); None where they have none of them."""
    pairs = ((seed, seed) for seed in values) if pairs is None else pairs
    found = [values[seed] - base[other] for seed, other in pairs if seed in values and other in base]
    if not found:
        return None
    return Difference(mean(found), stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None, len(found))


def judge(difference: Difference | None, direction: int) -> Verdict:
    """Whether a difference is one; `direction` is -1 where lower is better."""
    if difference is None:
        return UNMEASURED
    text = difference_text(difference)
    if difference.error is None or not direction:
        return Verdict("open" if direction else "", text)
    if difference.one_start:
        return Verdict(ONE_START, text)
    bound = t_95(difference.count - 1) * difference.error
    gain = direction * difference.value
    return Verdict("no difference" if abs(gain) <= bound else "ahead" if gain > 0 else "behind", text)


def difference_text(difference: Difference, *, percent: bool = False) -> str:
    """ "-3.1 ± 0.4 (n 3)"."""
    sign = "+" if difference.value > 0 else "\u2212" if difference.value < 0 else ""
    size = measurement_text(Measurement(abs(difference.value), difference.error), percent=percent)
    return f"{sign}{size} (n\u00a0{difference.count})"


@dataclass
class Setting:
    """Numbers of rows under one setting, in what they are compared."""

    title: str
    temperature: float | None = None
    """Of all rows; None where they have their own."""
    guidance: float = 1.0
    """Likewise, where several are measured."""
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """Row: metric: seed: value."""
    base: dict[str, str] = field(default_factory=dict)
    """Row: what it is compared with."""
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Row: between which seeds of both (`Sweep.partners`); equal ones where it is not there."""
    one_start: set[str] = field(default_factory=set)
    """Rows that are compared with one run, or that are one run which all of the other row started from."""
    notes: dict[str, str] = field(default_factory=dict)
    """Row: what else is said of it, as its temperature."""

    @property
    def columns(self) -> list[str]:
        return in_order({metric for metrics in self.values.values() for metric in metrics})

    def add(self, row: str, seed: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.values.setdefault(row, {}).setdefault(name, {})[seed] = value

    def differences(self, row: str) -> dict[str, Difference]:
        """Of a row to what it is compared with, by metric."""
        other = self.values.get(self.base.get(row, ""), {})
        of_row, pairs = self.values.get(row, {}), self.pairs.get(row)
        found = {name: paired(values, other.get(name, {}), pairs) for name, values in of_row.items()}
        return {name: replace(pair, one_start=row in self.one_start) for name, pair in found.items() if pair}


@dataclass(frozen=True)
class Summary:
    """All that tables and charts are made of."""

    sweep: Sweep
    settings: list[Setting]
    """Of every temperature, of the best ones, at equal entropy, and of training."""
    deciding: str | None
    """The metric by which rows are judged; None: nothing was measured."""
    notes: list[str]
    protocols: Protocols
    """What the numbers of samples are of."""
    validations: Protocols
    """What those of training are of."""

    def verdicts(self) -> tuple[list[str], dict[str, list[Verdict]]]:
        """Titles of the settings that were compared by `deciding`, and {row: a verdict for each}."""
        measured = [one for one in self.settings if any(self.deciding in found for found in one.values.values())]
        settings = sorted(measured, key=lambda one: one.temperature is not None)  # each at its best first
        direction = metric_of(self.deciding).direction if self.deciding else 0
        rows = {
            row: [judge(one.differences(row).get(self.deciding or ""), direction) for one in settings]
            for row in self.sweep.rows
        }
        compared = {row: found for row, found in rows.items() if any(one is not UNMEASURED for one in found)}
        return [one.title for one in settings], compared


def summarise(sweep: Sweep, results: Mapping[str, Json]) -> Summary:
    """The results of all cells, by name."""
    scored = {name: one for name, one in results.items() if not one["failure"]}
    rows = [line for one in scored.values() for line in one["results"]["rows"]]
    protocols, validations = Protocols("Protocol"), Protocols("Validation")
    deciding = deciding_metric(line["metrics"] for line in rows)
    grid: dict[tuple[float, float], Setting] = {}
    entropy, training, guided = Setting(EQUAL_ENTROPY), Setting(TRAINING), dict[str, float]()
    for name, result in scored.items():
        row, seed = sweep.cells[name].row, sweep.cells[name].seed
        protocols.add(row, seed, *measured_as(result["results"]))
        if result["validation"]:
            config, origin = result["asked"].get("config", {}), result["results"].get("origin", {})
            validations.add(row, seed, *held_out_of(config, origin))
        training.add(row, seed, {key: value for key, value in result["validation"].items() if value is not None})
        for line in result["results"]["rows"]:
            numbers, temperature = {key: one["value"] for key, one in line["metrics"].items()}, line["temperature"]
            asked = result["asked"]["evaluate"]
            guidance = line["guidance_scale"] if asked.get("guidance_scales") else 1.0
            if trained := sweep.cells.get(line.get("matched_to") or ""):
                at = f"{row} at the entropy of {trained.row}"
                entropy.add(at, trained.seed, numbers | {"temperature": temperature})
                protocols.add(at, trained.seed, *measured_as(result["results"]))
                entropy.base[trained.row], guided[trained.row] = at, guidance
                entropy.one_start |= {trained.row} if sweep.of_one_start(trained.row, row) else set()
            if temperature in asked["temperatures"]:
                setting = Setting(f"at {setting_text(temperature, guidance)}", temperature, guidance)
                grid.setdefault((temperature, guidance), setting).add(row, seed, numbers)
    for row, guidance in guided.items():
        entropy.values[row] = dict(grid[1.0, guidance].values.get(row, {})) if (1.0, guidance) in grid else {}
    of_grid = [in_rows(grid[place], sweep) for place in sorted(grid, key=lambda place: (place[1], -place[0]))]
    best = best_setting(sweep, grid, deciding)
    shown = [*of_grid, *([best] if len(grid) > 1 else ()), entropy]
    for setting in (*of_grid, best, training):
        setting.base = {row: sweep.compare_with for row in sweep.rows if row != sweep.compare_with}
        setting.pairs = {row: sweep.partners(row, base) for row, base in setting.base.items()}
        setting.one_start = {row for row, base in setting.base.items() if sweep.of_one_start(row, base)}
    for setting in (*shown, training):
        known = validations if setting is training else protocols
        setting.pairs = {row: known.alike(row, base, setting.pairs.get(row)) for row, base in setting.base.items()}
        seeds = {row: max(map(len, of.values()), default=0) for row, of in setting.values.items()}
        for row, count in seeds.items():
            of_seeds = f"n\u00a0{count}" if len(set(seeds.values())) > 1 else ""
            setting.notes[row] = "; ".join(filter(None, (setting.notes.get(row), of_seeds, known.name(row))))
        setting.notes = {row: note for row, note in setting.notes.items() if note}
    shown = [one for one in (*shown, in_rows(training, sweep)) if one.values]
    return Summary(sweep, shown, deciding, notes_of(sweep, results), protocols, validations)


def in_rows(setting: Setting, sweep: Sweep) -> Setting:
    """The setting with its rows in the order of the file."""
    return replace(setting, values={row: setting.values[row] for row in sweep.rows if row in setting.values})


def deciding_metric(rows: Iterable[Mapping[str, object]]) -> str | None:
    """The Fréchet distance to held-out images; where there is none, the first Fréchet distance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return next(filter(decides, names), next((name for name in names if name.startswith("FD(")), None))


def best_setting(sweep: Sweep, grid: Mapping[tuple[float, float], Setting], deciding: str | None) -> Setting:
    """Every row at one temperature (and guidance) for all its seeds, that at which its mean is best."""
    best = Setting(BEST)
    for row in sweep.rows:
        means = {
            place: over_seeds(setting.values[row][deciding]).value
            for place, setting in grid.items()
            if deciding is not None and deciding in setting.values.get(row, {})
        }
        if means:
            place = min(means, key=lambda one: means[one])
            best.values[row] = grid[place].values[row]
            best.notes[row] = setting_text(*place)
    return best


def notes_of(sweep: Sweep, results: Mapping[str, JsonMap]) -> list[str]:
    """What must be known to read the numbers, one sentence each."""
    notes = [f"{name} failed: {one['failure']}." for name, one in results.items() if one["failure"]]
    scored = {name: one for name, one in results.items() if not one["failure"]}
    notes += [
        f"{name} was stopped by its guard at step {one['stopped']['step']:,}: {one['stopped']['reason']}."
        for name, one in scored.items()
        if one["stopped"]
    ]
    again: dict[str, list[str]] = {}
    for name, one in scored.items():
        start = sweep.cells[name].start
        if start and start.name in scored and scored[start.name]["weights"] != one["start_weights"]:
            again.setdefault(start.name, []).append(name)
    for first, names in again.items():
        notes.append(f"{listed(names)} started from {first} trained again, to other weights than were measured.")
    tokens: dict[str, set[str]] = {}
    for held in (one.get("contents") or {} for one in scored.values()):
        for key in held:
            if key + MADE_OF in held:
                tokens.setdefault(held[key + MADE_OF], set()).add(held[key])
    if any(len(found) > 1 for found in tokens.values()):
        notes.append("The cells' tokens are of the same pictures and not all equal: processors round otherwise.")
    sessions = [each for one in scored.values() for each in one.get("sessions", ())]  # older results have none
    for what, values in (
        ("measured on different machines", {one["results"]["machine"] for one in scored.values()}),
        ("measured with different versions of torch", {one["versions"]["torch"] for one in scored.values()}),
        ("trained in different precisions", {each["precision"] for each in sessions}),
    ):
        if len(values) > 1:
            notes.append(f"The cells were {what}: {', '.join(sorted(values))}.")
    return notes + [
        f"{line}." for line in told_once(line for one in scored.values() for line in one["results"]["remarks"])
    ]


def value_cells(setting: Setting, row: str, columns: Sequence[str]) -> list[str]:
    """ "61.2 ± 1.3" for each column; "–" where nothing was measured."""
    found = setting.values.get(row, {})
    return [
        measurement_text(over_seeds(found[name]), percent=metric_of(name).unit == "%") if name in found else "–"
        for name in columns
    ]


def difference_cells(setting: Setting, row: str, columns: Sequence[str]) -> list[str]:
    """The differences of a row to what it is compared with, as text."""
    found = setting.differences(row)
    return [
        difference_text(found[name], percent=metric_of(name).unit == "%") if name in found else "–" for name in columns
    ]
