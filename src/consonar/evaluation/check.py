"""Does a result reproduce? What a file of results records is measured again, and the numbers are compared.

What is read: the results of samples, of a run (which is sampled again), of a cell of a sweep, and of a tokenizer.
How close numbers must come:

* The same pictures, measured again: 1e-4 of the value. On one machine all digits are expected and it is said whether
  they came; other processors, versions, threads and kernels add in another order, which moves float32 features in
  their last digits and a Fréchet distance, a small difference of large traces, by some 1e-5. Where a value is small
  beside its own spread, 1 % of that spread is allowed. Counts of images (precision, recall, copy rates, coverage) may
  differ by two images, whose nearest neighbour was a matter of rounding.
* Samples drawn again: twice the spread that was recorded. It is the deviation over m parts; that of the difference of
  two independent draws of all samples is sqrt(2 / m) of it, so that two spreads are 2.8 such deviations at 4 parts. A
  redraw has the same seeds and gives mostly the same pictures, but rounding can change a token, and with it the rest of
  one picture. A number without a spread may differ by 1 %.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, read_origin
from consonar.config_io import adapter, from_dict
from consonar.errors import UserError, reading
from consonar.evaluation.evaluate import evaluate, open_target
from consonar.evaluation.inputs import load_samples
from consonar.evaluation.reconstruction import evaluate_tokenizer
from consonar.evaluation.results import RECONSTRUCTION, RESULTS, Measurement, Row
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_json
from consonar.json_types import Json, JsonMap
from consonar.metrics import metric_of
from consonar.model_folders import SHIPPED
from consonar.sampling.job import Job, balanced_labels, run_job
from consonar.sampling.sample import SamplerConfig

RELATIVE, OF_SPREAD, IMAGES = 1e-4, 0.01, 2
SPREADS, WITHOUT_SPREAD = 2, 0.01
COUNTS = ("precision", "recall", "density", "coverage")  # and what is in percent
Value = TypeVar("Value")


@dataclass(frozen=True)
class Compared:
    """One number: as recorded, as measured now (None: not measured any more), and how far it may be off."""

    name: str
    before: float
    now: float | None
    allowed: float

    @property
    def holds(self) -> bool:
        return self.now is not None and abs(self.now - self.before) <= self.allowed


@dataclass(frozen=True)
class Check:
    """What came of it."""

    numbers: list[Compared]
    redrawn: bool
    """Whether the pictures were drawn again."""
    differs: list[str]
    """What is not as it was: versions, machine, hashes of what went in; one line each."""

    @property
    def reproduced(self) -> bool:
        return all(number.holds for number in self.numbers)

    @property
    def tolerance(self) -> str:
        """How close the numbers came, or were to come."""
        if all(number.now == number.before for number in self.numbers):
            return "digit for digit"
        if self.redrawn:
            return f"samples drawn again, within {SPREADS} spreads (without one {WITHOUT_SPREAD:.0%} of the value)"
        return f"the same pictures, within {RELATIVE:g} of the value, {OF_SPREAD:.0%} of its spread or {IMAGES} images"


@dataclass(frozen=True)
class Record:
    """A file of results, and what there is now in the place of what it was made from."""

    path: Path
    content: Json
    samples: Path | None
    """The samples, or the run; None: where the record says, or beside it."""
    reference: str | None
    tokenizer: str | None
    device: str
    progress: Callable[[str], None]

    def get(self, key: str, kind: type[Value]) -> Value:
        """An entry by dotted path. `UserError` where it is missing or of another kind."""
        value: object = self.content
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} is {value!r:.60}; not a file of results, damaged, or too old to check")
        return value

    def target(self, key: str) -> str:
        """Against what was measured."""
        return self.get(key, str) if self.reference is None else self.reference

    def network(self) -> str:
        """What loads the feature network: its name, or that with its place."""
        return self.get(f"feature_network.{'place' if 'place' in self.get('feature_network', dict) else 'name'}", str)

    def settings(self, seed: int) -> Json:
        """How it was measured; the device is that of now."""
        return {**self.get("config", dict), "seed": seed, "device": self.device}


def check_results(
    path: Path,
    *,
    samples: Path | None = None,
    reference: str | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> Check:
    """Measures again what the file `path` records. `samples` (or the run), `reference` and `tokenizer`: where these lie
    now, if not where they lay.

    Raises `UserError` for a file without such a record, and where what it was made from is nowhere to be found.
    """
    record = Record(path, read_json(path), samples, reference, tokenizer, device, progress)
    if "asked" in record.content:  # a cell of a sweep
        failure = record.content.get("failure")
        if failure is not None:
            raise UserError(f"{path}: records a run that failed ({failure}); there is nothing to measure")
        run = samples or path.parent / record.get("run", str)
        record = Record(path, record.get("results", dict), run, reference, tokenizer, device, progress)
    with reading(path, "results as `evaluate` writes them"):
        before, made = numbers_of(record.content), made_of(record.content)
    if not before:
        raise UserError(f"{path}: records no number; evaluate again")
    again = run_again if "rows" in record.content else samples_again if "metrics" in record.content else codec_again
    with tempfile.TemporaryDirectory() as folder:
        now, redrawn = again(record, Path(folder))
    after = numbers_of(now)
    sizes = [record.content, *record.content.get("rows", ())]
    count = min(int(one.get(key) or 10_000) for one in sizes for key in ("num_samples", "num_images"))
    numbers = [
        Compared(name, found.value, after[name].value if name in after else None, allowed(name, found, count, redrawn))
        for name, found in before.items()
    ]
    return Check(numbers, redrawn, differences(made, made_of(now)))


def allowed(name: str, recorded: Measurement, count: int, redrawn: bool) -> float:
    """How far a number of `count` images may be off."""
    size, spread, metric = abs(recorded.value), recorded.spread or recorded.error or 0.0, name.rpartition(": ")[2]
    images = IMAGES / count if metric in COUNTS or metric_of(metric).unit == "%" else 0.0
    if redrawn:
        return max(SPREADS * spread or WITHOUT_SPREAD * size, images)
    return max(RELATIVE * size, OF_SPREAD * spread, images)


def numbers_of(content: JsonMap) -> dict[str, Measurement]:
    """The metrics of results, of each row with its temperature before the name."""
    if "rows" in content:
        rows = adapter(Annotated[list[Row], Field(min_length=1)]).validate_python(content["rows"])
        return {f"temperature {row.temperature:g}: {name}": one for row in rows for name, one in row.metrics.items()}
    if "metrics" in content:
        read: dict[str, Measurement] = adapter(dict[str, Measurement]).validate_python(content["metrics"])
        return read
    return {name: Measurement(float(value)) for name, value in content.items() if isinstance(value, int | float)}


def made_of(content: JsonMap) -> Json:
    """What went into results, by what it is called in a message."""
    found = {"machine": content.get("machine"), "weights": content.get("checkpoint_sha256")}
    reference, samples, origin = (content.get(key) or {} for key in ("reference", "samples", "origin"))
    hashes = reference if isinstance(reference, Mapping) else content.get("reference_sha256") or {}
    found |= {f"reference, {key.removesuffix('_sha256')}": value for key, value in hashes.items() if key != "name"}
    found |= content.get("versions") or {}
    found |= {f"feature network, {key}": value for key, value in (content.get("feature_network") or {}).items()}
    found |= {"samples": samples.get("sha256"), "generator": (samples.get("settings") or {}).get("generator_sha256")}
    found["tokenizer"] = (content.get("tokenizer") or {}).get("fingerprint")
    if "rows" not in content:  # of a tokenizer; that of a run is of its making, not of the measurement
        found |= {key: value for key, value in origin.items() if key != "reference"}
    return found | {"device": (content.get("config") or {}).get("device")}


def differences(before: JsonMap, now: JsonMap) -> list[str]:
    """What differs, in words; what one of them does not say is not compared."""
    lines = []
    for key, value in before.items():
        if None not in (value, now.get(key)) and value != now[key]:
            was, is_now = (v[:12] if isinstance(v, str) and len(v) == 64 else v for v in (value, now[key]))
            lines.append(f"{key}: {was} then, {is_now} now")
    return lines


def samples_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """Results of a file or folder of samples; where it is gone, it is drawn again by the generator that it names."""
    named = Path(record.get("samples.name", str))
    places = [record.samples] if record.samples else [named, record.path.parent / named.name]
    place = next((path for path in places if path.exists()), None)
    settings = from_dict(record.settings(record.get("seed", int)), str(record.path), EvaluationSettings)
    redrawn = place is None
    if place is None:
        place = draw_again(record, named, folder / "samples.npz", settings)
    samples = load_samples(place)
    codec = record.tokenizer
    if codec is None and "copy rate (tokens)" in record.content["metrics"]:
        codec = (record.content.get("tokenizer") or {}).get("name") or (samples.settings or {}).get("tokenizer")
        if codec not in SHIPPED["tokenizer"] and not Path(str(codec)).is_dir():
            raise UserError(f"{record.path}: holds a copy rate in tokens of {codec!r}; say where it lies: --tokenizer")
    target = open_target(samples, record.target("reference"), codec, settings)
    evaluate(samples, target, settings, feature_network=record.network()).to_json(folder / RESULTS)
    content = read_json(folder / RESULTS)
    if redrawn:
        content["samples"].pop("sha256")  # another file, of other names and versions
    return content, redrawn


def draw_again(record: Record, named: Path, to: Path, settings: EvaluationSettings) -> Path:
    """The samples of a file that is gone, from what it said of its making."""
    made = record.content["samples"].get("settings")
    remedy = f"name the samples, or draw them again: consonar evaluate SAMPLES --check {record.path}"
    if record.samples or not isinstance(made, dict):
        raise UserError(f"{record.path}: {record.samples or named} is not there; {remedy}")
    source, count = record.get("samples.settings.generator", str), record.get("samples.settings.num_samples", int)
    record.progress(f"{named} is gone: {count} samples are drawn again from {source}")
    generator, shipped = load_generator(source).to(settings.device), made.get("tokenizer") in SHIPPED["tokenizer"]
    tokenizer = load_tokenizer(made["tokenizer"]) if shipped else load_own_tokenizer(source)
    job = Job(
        generator, tokenizer.to(settings.device), balanced_labels(count, generator.num_classes),
        seed=record.get("samples.settings.seed", int),
        sampler=from_dict(record.get("samples.settings.sampler", dict), str(record.path), SamplerConfig),
        source=source, origin=read_origin(source), precision=made.get("precision", "fp32"),
    )  # fmt: skip
    if job.settings["labels_sha256"] != made.get("labels_sha256"):
        raise UserError(f"{record.path}: {named} is not there, and the classes of its images are not known; {remedy}")
    return run_job(job, to, batch_size=settings.batch_size)


def run_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """Results of a run, sampled again at all temperatures."""
    row = record.get("rows", list)[0]
    names = [item.name for item in fields(SamplerConfig) if item.name in row and item.name != "temperature"]
    settings = from_dict(
        {
            **record.settings(row["seed"]),
            "sampler": {name: row[name] for name in names},
            "num_samples": row["num_samples"],
            "temperatures": list(dict.fromkeys(float(one["temperature"]) for one in record.content["rows"])),
            "reconstruct": False,
        },
        str(record.path), RunSettings,
    )  # fmt: skip
    run = stand_in(record.samples or record.path.parent, folder, record.path)
    content = evaluate_run(
        run, settings, reference=record.target("reference.name"),
        feature_network=record.network(), progress=record.progress,
    )  # fmt: skip
    return content, True


def codec_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """The reconstruction metrics of a tokenizer."""
    run, origin = stand_in(record.samples or record.path.parent, folder, record.path), record.get("origin", dict)
    network = next((name[4:-1] for name in record.content if name.startswith("rFD(")), "efficientnet-lite0")
    evaluate_tokenizer(
        run, reference=record.target("origin.reference"), feature_network=origin.get("feature_network", network),
        device=record.device, precision=record.get("origin.precision", str),
        validation_split=origin.get("validation_split"),
    )  # fmt: skip
    return read_json(run / RECONSTRUCTION), False


def stand_in(run: Path, folder: Path, path: Path) -> Path:
    """A folder like the run, for results of its own: what is in the run, but its results, by links."""
    if not (run / "model").is_dir():
        raise UserError(f"{path}: no trained model in {run}; name the run: consonar evaluate RUN --check {path}")
    made = folder / run.resolve().name
    made.mkdir()
    for entry in run.iterdir():
        if not entry.name.startswith(("samples", ".")) and entry.name not in (RESULTS, RECONSTRUCTION):
            (made / entry.name).symlink_to(entry.resolve())
    return made
