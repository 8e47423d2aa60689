"""How close numbers that were measured again come to those that a file of results records, and what else differs.

How close numbers must come:

* The same pictures, measured again: 1e-4 of the value. On one machine all digits are expected and it is said whether
  they came; other processors, versions, threads and kernels add in another order, which moves float32 features in
  their last digits and a Fréchet distance, a small difference of large traces, by some 1e-5. Where a value is small
  beside its own spread, 1 % of that spread is allowed. Counts of images may differ by two, whose nearest
  neighbour was a matter of rounding: of the samples that were compared one by one (precision, density, copy rates), or
  of the images of the reference (recall, coverage).
* Samples drawn again: twice the spread that was recorded. It is the deviation over m parts; that of the difference of
  two independent draws of all samples is sqrt(2 / m) of it, so that two spreads are 2.8 such deviations at 4 parts. A
  redraw has the same seeds and gives mostly the same pictures, but rounding can change a token, and with it the rest of
  one picture. A number without a spread may differ by 1 %, KID, which may be near 0, by 0.25 / sqrt(n) of n samples
  where that is more: what twice the spread of 4 parts is in the middle of this repository's results (claims/results).
  What is below that is not seen, which the verdict says.
* Not drawn again is the noise floor, which is of the reference alone, nor the teacher-forced entropy of the recorded
  weights: as the same pictures.
* Each class of a mean over C classes: the same; without a spread sqrt(C) times as far as the mean, which averages C of
  them. The class that is farthest off, beside what is allowed, is the one that is told.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from consonar.config_io import adapter
from consonar.evaluation.results import Measurement, Row, setting_text
from consonar.evaluation.runs import ENTROPY
from consonar.json_types import Json, JsonMap
from consonar.metrics import decides, metric_of

RELATIVE, OF_SPREAD, IMAGES = 1e-4, 0.01, 2
SPREADS, WITHOUT_SPREAD, OF_KERNELS = 2, 0.01, 0.25
SHARES = {
    "precision": "compared", "density": "compared", "recall": "reference", "coverage": "reference",
    "copy rate (features)": "compared",
}  # fmt: skip
"""What images a share is of (`image_counts`); what else is in percent is of all samples."""
UNKNOWN = 10_000
"""Images where an older file does not say how many there were."""
FLOOR, EXACT = "noise floor: ", "exact"
MODELS = ("weights", "generator", "checkpoint_sha256", "tokenizer")
"""What was measured, by the names of `made_of`; the pictures are told by their hash."""
Numbers = Mapping[str, Measurement]


@dataclass(frozen=True)
class Compared:
    """One number: as recorded, as measured now (None: not measured any more), and how far it may be off."""

    name: str
    before: float
    now: float | None
    allowed: float

    @property
    def holds(self) -> bool:
        return self.off <= 1

    @property
    def off(self) -> float:
        """The difference, in what is allowed."""
        if self.now is None:
            return math.inf
        gap = abs(self.now - self.before)
        return gap / self.allowed if gap and self.allowed else (math.inf if gap else 0.0)


@dataclass(frozen=True)
class Check:
    """What came of it."""

    numbers: list[Compared]
    redrawn: bool
    """Whether the pictures were drawn again."""
    differs: list[str]
    """What is not as it was: versions, machine, hashes of what went in; one line each."""
    other_weights: bool = False
    """Whether a model is another one than the recorded one."""

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

    @property
    def unseen(self) -> str:
        """How large a difference of redrawn samples would have passed."""
        if not self.redrawn or all(number.now == number.before for number in self.numbers):
            return ""
        one = next((number for number in self.numbers if decides(number.name.rpartition(": ")[2])), self.numbers[0])
        return f"; not seen are differences below those allowed, as {one.allowed:.2g} of {one.before:.4g} in {one.name}"

    @property
    def verdict(self) -> str:
        """One line: first of which weights the numbers are, where they are not of the recorded ones."""
        count, ours = sum(not number.holds for number in self.numbers), "not the recorded weights: "
        words = f"not reproduced: {count} of {len(self.numbers)} numbers differ ({self.tolerance})"
        if self.reproduced:
            words = f"{'their numbers are ' if self.other_weights else ''}reproduced: {self.tolerance}{self.unseen}"
        return ours * self.other_weights + words


def compare(
    before: Numbers, after: Numbers, sizes: Mapping[str, int], samples_redrawn: bool, other_weights: bool = False
) -> list[Compared]:
    """Every recorded number, and of each mean over classes the class that is farthest off."""
    found = []
    if EXACT in {*before, *after}:  # where there are none, no number is written
        before, after = ({EXACT: Measurement(0.0)} | dict(one) for one in (before, after))
    for name, one in before.items():
        again, of_model = after.get(name), name.endswith(ENTROPY) and not other_weights
        redrawn = samples_redrawn and not (of_model or name.startswith(FLOOR))
        found.append(
            Compared(name, one.value, None if again is None else again.value, allowed(name, one, sizes, redrawn))
        )
        if one.classes:
            now, times = (again.classes if again else None) or {}, len(one.classes) ** 0.5 if redrawn else 1
            of_each = [
                Compared(
                    f"{name}, class {label}", value, now.get(label),
                    times * allowed(name, Measurement(value), sizes, redrawn),
                )
                for label, value in one.classes.items()
            ]  # fmt: skip
            found.append(max(of_each, key=lambda each: each.off))
    return found


def allowed(name: str, recorded: Measurement, sizes: Mapping[str, int], redrawn: bool) -> float:
    """How far a number of images of these `image_counts` may be off."""
    size, spread, metric = abs(recorded.value), recorded.spread or recorded.error or 0.0, name.rpartition(": ")[2]
    counted = SHARES.get(metric, "samples" if metric_of(metric).unit == "%" else None)
    images = IMAGES / sizes[counted] if counted else IMAGES if metric == EXACT else 0
    if redrawn:
        kernels = OF_KERNELS / sizes["samples"] ** 0.5 if metric.startswith("KID") else 0.0
        return max(SPREADS * spread or max(WITHOUT_SPREAD * size, kernels), images)
    return max(RELATIVE * size, OF_SPREAD * spread, images)


def image_counts(content: JsonMap) -> dict[str, int]:
    """Of how many images shares are: of `samples`, those `compared` one by one, and those of the `reference`."""
    row, config, of_sets, of_run = (
        one if isinstance(one, Mapping) else {}
        for one in ((content.get("rows") or [content])[0], *map(content.get, ("config", "num_reference", "reference")))
    )
    known = [of_sets.get("train"), of_sets.get("reference"), of_run.get("num_train"), of_run.get("num_reference")]
    count = row.get("num_samples", row.get("num_images"))  # of a tokenizer its pictures
    sizes = (count, config.get("max_neighbours_images"), next(filter(None, known), None))
    samples, most, reference = (int(size or UNKNOWN) for size in sizes)
    return {"samples": samples, "compared": min(samples, most), "reference": min(reference, most)}


def numbers_of(content: JsonMap) -> dict[str, Measurement]:
    """The metrics of results, of each row with its temperature before the name, and the noise floor."""
    floor = adapter(dict[str, float | Measurement]).validate_python(content.get("noise_floor") or {})
    floors = {f"{FLOOR}{key}": one if isinstance(one, Measurement) else Measurement(one) for key, one in floor.items()}
    if "rows" in content:
        rows = adapter(Annotated[list[Row], Field(min_length=1)]).validate_python(content["rows"])
        return {
            f"{setting_text(row.temperature, row.guidance_scale)}: {name}": one
            for row in rows
            for name, one in row.metrics.items()
        } | floors
    if "metrics" in content:
        return adapter(dict[str, Measurement]).validate_python(content["metrics"]) | floors
    return {name: Measurement(float(value)) for name, value in content.items() if isinstance(value, int | float)}


def made_of(content: JsonMap) -> Json:
    """What went into results, by what it is called in a message."""
    found = {"machine": content.get("machine"), "weights": content.get("checkpoint_sha256")}
    reference, samples, origin = (content.get(key) or {} for key in ("reference", "samples", "origin"))
    hashes = reference if isinstance(reference, Mapping) else content.get("reference_sha256") or {}
    found |= {f"reference, {key.removesuffix('_sha256')}": value for key, value in hashes.items() if key != "name"}
    found |= content.get("versions") or {}
    network = content.get("feature_network") or {}
    found |= {f"feature network, {key}": value for key, value in network.items() if key != "place"}
    found |= {"samples": samples.get("sha256"), "generator": (samples.get("settings") or {}).get("generator_sha256")}
    found["tokenizer"] = (content.get("tokenizer") or {}).get("fingerprint")
    found["detector"] = content.get("detector_sha256")
    if "rows" not in content:  # of a tokenizer; that of a run is of its making, not of the measurement
        places = ("reference", "tokenizer_place", "feature_network", "bad_images", "remarks")
        found |= {key: value for key, value in origin.items() if key not in places}
    left_out = (content.get("bad_images") or origin.get("bad_images") or {}).get("left_out") or {}
    found |= {f"left out of {part}": count for part, count in left_out.items()}
    return found | {"device": (content.get("config") or {}).get("device")}


def differences(before: JsonMap, now: JsonMap) -> list[str]:
    """What differs, in words; what one of them does not say is not compared."""
    lines = []
    for key, value in before.items():
        if None not in (value, now.get(key)) and value != now[key]:
            was, is_now = (v[:12] if isinstance(v, str) and len(v) == 64 else v for v in (value, now[key]))
            lines.append(f"{key}: {was} then, {is_now} now")
    return lines


def model_differs(before: JsonMap, now: JsonMap) -> bool:
    """Whether what was measured is known to be of other weights than what is measured now."""
    return any(None not in (before.get(key), now.get(key)) and before[key] != now[key] for key in MODELS)
