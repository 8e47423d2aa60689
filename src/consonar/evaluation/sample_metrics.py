"""The metrics of samples: how they are measured, the reference made ready for it, and a table of functions.

A new metric of samples is a row in `SAMPLE_METRICS`, and one in `consonar.metrics.METRICS` for its heading on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Annotated

from torch import Tensor

from consonar.errors import UserError
from consonar.evaluation.features import FeatureSet, ImagesDone, Statistics, cached_features
from consonar.evaluation.inputs import ReferenceSet, SampleSet
from consonar.json_types import Json
from consonar.metrics.copying import CopyRate, copy_rate_features, copy_rate_tokens
from consonar.metrics.distribution import Target
from consonar.networks import FeatureNetwork, ScoringNetwork
from consonar.options import Count, Range, check_options
from consonar.seeding import check_seed

LARGEST = 1e30
"""Of the numbers of a Gaussian: the product of two covariances is calculated with."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How samples are measured. Raises `UserError` for settings with which nothing can be."""

    num_neighbours: int = 3
    """k of improved precision and recall (Kynkäänniemi et al. 2019)."""
    max_neighbours_images: int = 10_000
    """Images of a set that are compared with each other, drawn by `seed` and the pixels."""
    copy_quantile: Annotated[float, Range(0, 1, note="0 is the minimum")] = 0.0
    """Which quantile of the distances of validation images is the threshold of the copy rates; 0 is the minimum."""
    batch_size: Count = 64
    """Images per call of a network."""
    device: str = "cpu"
    """Where a network runs that is given by its name."""
    draws: int = 1
    """Disjoint parts of equal size whose spread is reported; 1: none is."""
    seed: int = 0
    """Of the parts, of the images that are compared with each other, and of the first sample of a run."""

    def __post_init__(self) -> None:
        check_options(self, "")
        check_seed(self.seed, "seed")
        if self.max_neighbours_images <= self.least:
            needed = f"{self.num_neighbours} neighbours need more"
            raise UserError(f"max_neighbours_images: {self.max_neighbours_images}; {needed}")

    @property
    def least(self) -> int:
        """A set needs more images than these: for neighbours, and for a covariance."""
        return max(self.num_neighbours, 1)

    def check_parts(self, count: int, what: str) -> None:
        """Raises `UserError` where so many images, called `what`, cannot be measured in `draws` parts."""
        if self.draws < 1:
            raise UserError(f"draws: {self.draws}; choose 1 or more")
        if count // self.draws <= self.least:
            raise UserError(f"{what}: {count} images; each of {self.draws} draws needs over {self.least}")

    @property
    def stored(self) -> Json:
        """What results.json says of them, under `config`; the seed stands beside it."""
        return {item.name: getattr(self, item.name) for item in fields(EvaluationSettings) if item.name != "seed"}


@dataclass(frozen=True)
class PreparedReference:
    """What samples are compared with, in the features of one network: calculated once for any number of samples."""

    given: ReferenceSet
    network: FeatureNetwork
    features: dict[str, FeatureSet]
    """Of each set of images, by its name."""
    target: Target
    """Of the features: for FD, precision and recall."""
    spatial: Target | None
    """Of spatial features, for sFID; None where the network or given statistics have none."""

    @property
    def noise_floor(self) -> dict[str, float]:
        """By metric, the Fréchet distances between the sets of the reference: what real images reach."""
        return {
            f"{kind}({self.network.name}) {name}": value
            for kind, target in (("FD", self.target), ("sFD", self.spatial))
            if target is not None
            for name, value in target.noise_floor().items()
        }


def prepare_reference(
    reference: ReferenceSet, network: FeatureNetwork, settings: EvaluationSettings, progress: ImagesDone | None = None
) -> PreparedReference:
    """The features of the reference (`cached_features`) and what is made of them; `UserError` for too few images."""
    known = {
        name: cached_features(
            network, images, batch_size=settings.batch_size, max_rows=settings.max_neighbours_images,
            seed=settings.seed, progress=progress,
        )
        for name, images in reference.images.items()
    }  # fmt: skip
    k = settings.num_neighbours
    for name, found in known.items():
        need, use = (2, "a covariance") if name == "validation" else (k + 1, f"precision and recall of {k} neighbours")
        if (count := found.moments.count) < max(2, need):
            few = f"{count} image(s) as {name}; {use} needs {max(2, need)} or more"
            raise UserError(f"reference {reference.name}: {few}")
    near = known.get("train") or known.get("reference")
    gaussians = {name: (found.moments.mean, found.moments.cov) for name, found in known.items()}
    gaussians |= given_gaussian(reference, reference.statistics, network.name, network.num_features)
    target, spatial = Target(gaussians, near.rows if near else None, k), None
    if isinstance(network, ScoringNetwork) and (reference.spatial_statistics or not reference.statistics):
        gaussians = {name: (kept.mean, kept.cov) for name, found in known.items() if (kept := found.spatial)}
        what = f"{network.name} (spatial)"
        spatial = Target(gaussians | given_gaussian(reference, reference.spatial_statistics, what, network.num_spatial))
    return PreparedReference(reference, network, known, target, spatial)


def given_gaussian(
    reference: ReferenceSet, statistics: tuple[Tensor, Tensor] | None, network: str, num_features: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The Gaussian that the reference brings instead of images; UserError for what is not one of this network."""
    if statistics is None:
        return {}
    (mean, cov), where = statistics, f"reference {reference.name}"
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        swapped = "; are the two exchanged?" if mean.ndim == 2 and cov.ndim == 1 else ""
        shapes = f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)}"
        raise UserError(f"{where}: {shapes}; expected (F,) and (F, F){swapped}")
    if len(mean) != num_features:
        raise UserError(f"{where}: {len(mean)} features, {network} has {num_features}")
    if not (mean.abs().max() <= LARGEST and cov.abs().max() <= LARGEST):
        raise UserError(f"{where}: its mean or covariance holds NaN or numbers over {LARGEST:g}; make it again")
    return {"reference": statistics}


@dataclass(frozen=True)
class Measured:
    """What a metric is made of: samples, which are all or one of the disjoint parts of them, and the reference."""

    reference: PreparedReference
    samples: Statistics
    rows: Tensor
    """(R, F) float32: the features of these samples, or of so many that were drawn from them."""
    copies: dict[str, Tensor | str]
    """`features` and `tokens`: which of them are copies, (R,) or (S,) bool; or why that is not known."""

    @cached_property
    def precision_recall(self) -> tuple[float, float] | None:
        """Against the reference's vectors; None where it has none."""
        return self.reference.target.precision_recall(self.rows)


SampleMetric = Callable[[Measured], float | str | None]
"""The value, or in words why there is none; None: the question does not arise, with this network or reference."""


def frechet_distance_to(name: str, measured: Measured) -> float | None:
    return measured.reference.target.distance(name, measured.samples.moments)


def spatial_distance_to(name: str, measured: Measured) -> float | str | None:
    target, spatial = measured.reference.spatial, measured.samples.spatial
    if target is not None and spatial is not None:
        return target.distance(name, spatial)
    return None if spatial is None or name != "reference" else "the reference's statistics have no mu_s and sigma_s"


def inception_score_of(measured: Measured) -> float | None:
    return None if measured.samples.scores is None else measured.samples.scores.value


def precision_or_recall(index: int, measured: Measured) -> float | str:
    if measured.precision_recall is not None:
        return measured.precision_recall[index]
    alone = "has validation images alone" if measured.reference.given.images else "holds statistics, no images"
    return f"the reference {alone}"


def copy_rate(kind: str, measured: Measured) -> float | str:
    copies = measured.copies[kind]
    return copies if isinstance(copies, str) else float(copies.double().mean())


SAMPLE_METRICS: dict[str, SampleMetric] = {
    "FD({network}) train": partial(frechet_distance_to, "train"),
    "FD({network}) validation": partial(frechet_distance_to, "validation"),
    "FD({network})": partial(frechet_distance_to, "reference"),
    "sFD({network}) train": partial(spatial_distance_to, "train"),
    "sFD({network}) validation": partial(spatial_distance_to, "validation"),
    "sFD({network})": partial(spatial_distance_to, "reference"),
    "IS({network})": inception_score_of,
    "precision": partial(precision_or_recall, 0),
    "recall": partial(precision_or_recall, 1),
    "copy rate (features)": partial(copy_rate, "features"),
    "copy rate (tokens)": partial(copy_rate, "tokens"),
}
"""By name, in which {network} stands for that of the feature network; in the order of results.json."""


def measure(measured: Measured) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of the table that there are, and why others cannot be measured."""
    values: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for template, metric in SAMPLE_METRICS.items():
        name, found = template.format(network=measured.reference.network.name), metric(measured)
        if isinstance(found, str):
            unavailable[name] = found
        elif found is not None:
            values[name] = found
    return values, unavailable


def all_and_parts(
    found: FeatureSet, reference: PreparedReference, copies: dict[str, CopyRate | str], part_of: Tensor
) -> Iterator[Measured]:
    """All samples with these features, then each of their parts; `part_of` (S,) int64 as in `extract_features`."""
    for index, samples in enumerate((found, *found.parts), start=-1):
        members = part_of == index if index >= 0 else part_of >= -1  # (S,)
        of_members = {
            kind: copied if isinstance(copied, str) else copied.is_copy[members[copied.rows]]
            for kind, copied in copies.items()
        }
        yield Measured(reference, samples, found.rows[members[found.indices]], of_members)


def copy_rates(
    samples: SampleSet, found: FeatureSet, reference: PreparedReference, quantile: float
) -> dict[str, CopyRate | str]:
    """The copy rates in `features` and `tokens`, or why one cannot be measured."""
    known, tokens = reference.features, reference.given.tokens
    if not {"train", "validation"} <= known.keys():
        return dict.fromkeys(("features", "tokens"), "the reference has no train and validation images")
    train = known["train"]
    near = copy_rate_features(found.rows, train.rows, known["validation"].rows, quantile=quantile)
    in_features = replace(near, indices=train.indices[near.indices], rows=found.indices)
    if samples.tokens is None or tokens is None:
        bare = "samples carry" if samples.tokens is None else "reference carries"
        return {"features": in_features, "tokens": f"the {bare} no tokens"}
    in_tokens = copy_rate_tokens(samples.tokens, tokens["train"], tokens["validation"], quantile=quantile)
    return {"features": in_features, "tokens": in_tokens}
