"""The metrics of samples: a table of functions, and what they are given: samples, and the reference made ready.

A new metric is a row in `SAMPLE_METRICS`, and one in `consonar.metrics.METRICS` for its heading on the page.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from consonar.errors import UserError
from consonar.evaluation.features import FeatureSet, ImagesDone, Statistics, cached_features
from consonar.evaluation.inputs import ReferenceSet, SampleSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.copying import CopyRate, copy_rate_features, copy_rate_tokens
from consonar.metrics.distribution import Target
from consonar.networks import FeatureNetwork, ScoringNetwork

LARGEST = 1e30
"""Of the numbers of a Gaussian: the product of two covariances is calculated with."""


class PreparedReference:
    """What samples are compared with, in the features of one network: calculated once for any number of samples.

    `features` (`cached_features`) are those of each set of images by its name; `target` is for FD, precision and
    recall, `spatial` for sFD, None where the network or given statistics have none. `UserError` for too few images.
    """

    def __init__(
        self,
        given: ReferenceSet,
        network: FeatureNetwork,
        settings: EvaluationSettings,
        progress: ImagesDone | None = None,
    ) -> None:
        self.given, self.network, k = given, network, settings.num_neighbours
        self.features = {
            name: cached_features(network, images, settings, progress) for name, images in given.images.items()
        }
        for name, found in self.features.items():
            held_out = name == "validation"
            need, use = (2, "a covariance") if held_out else (k + 1, f"precision and recall of {k} neighbours")
            if (count := found.moments.count) < need:
                raise UserError(f"reference {given.name}: {count} image(s) as {name}; {use} needs {need} or more")
        near = self.features.get("train") or self.features.get("reference")
        gaussians = {name: (found.moments.mean, found.moments.cov) for name, found in self.features.items()}
        gaussians |= given_gaussian(given, given.statistics, network.name, network.num_features)
        self.target = Target(gaussians, near.rows if near else None, k)
        self.spatial: Target | None = None
        if isinstance(network, ScoringNetwork) and (given.spatial_statistics or not given.statistics):
            spatial = {name: (kept.mean, kept.cov) for name, found in self.features.items() if (kept := found.spatial)}
            what = f"{network.name} (spatial)"
            spatial |= given_gaussian(given, given.spatial_statistics, what, network.num_spatial)
            self.spatial = Target(spatial)

    @property
    def noise_floor(self) -> dict[str, float]:
        """By metric, the Fréchet distances between the sets of the reference: what real images reach."""
        return {
            f"{kind}({self.network.name}) {name}": value
            for kind, target in (("FD", self.target), ("sFD", self.spatial))
            if target is not None
            for name, value in target.noise_floor().items()
        }


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
    "IS({network})": lambda measured: measured.samples.scores.value if measured.samples.scores else None,
    "precision": partial(precision_or_recall, 0),
    "recall": partial(precision_or_recall, 1),
    "copy rate (features)": partial(copy_rate, "features"),
    "copy rate (tokens)": partial(copy_rate, "tokens"),
}
"""By name, in which {network} stands for that of the feature network; in the order of results.json."""


def measure(
    found: FeatureSet, reference: PreparedReference, copies: dict[str, CopyRate | str], part_of: Tensor
) -> Iterator[tuple[dict[str, float], dict[str, str]]]:
    """The metrics of all samples, then of each part (`part_of` of `extract_features`); and why others are missing."""
    for index, samples in enumerate((found, *found.parts), start=-1):
        members = part_of == index if index >= 0 else part_of >= -1  # (S,)
        of_members = {
            kind: copied if isinstance(copied, str) else copied.is_copy[members[copied.rows]]
            for kind, copied in copies.items()
        }
        measured = Measured(reference, samples, found.rows[members[found.indices]], of_members)
        values: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for template, metric in SAMPLE_METRICS.items():
            name, value = template.format(network=reference.network.name), metric(measured)
            if isinstance(value, str):
                unavailable[name] = value
            elif value is not None:
                values[name] = value
        yield values, unavailable


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
