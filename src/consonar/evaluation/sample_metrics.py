"""The metrics of samples: a table of functions, and what they are given.

A new metric is a row in `SAMPLE_METRICS`, and one in `consonar.metrics.METRICS` for its heading on the page.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean

from torch import Tensor

from consonar.errors import UserError, check_choice
from consonar.evaluation.features import FeatureSet, Statistics
from consonar.evaluation.inputs import SampleSet
from consonar.evaluation.reference import PreparedReference
from consonar.evaluation.results import Measurement
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.copying import CopyRate, copy_rate_features, copy_rate_tokens
from consonar.metrics.frechet import SUBSETS, class_distances, frechet_distance_at_infinity
from consonar.metrics.kernels import kernel_distance, kernel_distance_error, kernel_mean
from consonar.metrics.neighbours import density_coverage, precision_recall


@dataclass(frozen=True)
class Measured:
    """What a metric is made of: samples, which are all or one of the disjoint parts of them, and the reference."""

    reference: PreparedReference
    samples: Statistics
    rows: Tensor
    """(R, F) float32: the features of these samples, or of so many that were drawn from them, in a random order."""
    copies: dict[str, Tensor | str]
    """`features` and `tokens`: which of them are copies, (R,) or (S,) bool; or why that is not known."""
    every: FeatureSet | None = None
    """Of all samples, and where a metric asks for that with every vector; None for a part."""
    labels: Tensor | None = None
    """Of all samples, (S,)."""
    class_names: tuple[str, ...] | None = None
    """Of the classes that labels count."""

    @cached_property
    def kernel_mean(self) -> float:
        """Of the samples, whichever set they are compared with."""
        return kernel_mean(self.rows)

    @cached_property
    def precision_recall(self) -> tuple[float, float] | str:
        """Against the reference's vectors; or why there is none."""
        return self.of_neighbours(precision_recall, self.reference.settings.num_neighbours)

    @cached_property
    def density_coverage(self) -> tuple[float, float] | str:
        return self.of_neighbours(density_coverage, self.reference.settings.density_neighbours)

    def of_neighbours(self, metric: Callable[..., tuple[float, float]], k: int) -> tuple[float, float] | str:
        known = self.reference.neighbours
        if known is None:
            alone = "has validation images alone" if self.reference.given.images else "holds statistics, no images"
            return f"the reference {alone}"
        if k not in self.reference.radii:
            return f"{k} neighbours need {k + 1} images of the reference or more"
        return metric(known, self.rows, k, reference_radii=self.reference.radii[k])


SampleMetric = Callable[[Measured], float | Measurement | str | None]
"""The value, or in words why there is none; None: the question does not arise, with this network or reference."""


def frechet_distance_to(name: str, measured: Measured) -> float | None:
    return measured.reference.target.distance(name, measured.samples.moments)


def spatial_distance_to(name: str, measured: Measured) -> float | str | None:
    target, spatial = measured.reference.spatial, measured.samples.spatial
    if target is not None and spatial is not None:
        return target.distance(name, spatial)
    return None if spatial is None or name != "reference" else "the reference's statistics have no mu_s and sigma_s"


def distance_at_infinity_to(name: str, measured: Measured) -> Measurement | str | None:
    gaussian, every = measured.reference.target.gaussians.get(name), measured.every
    if gaussian is None or every is None:
        return None
    if every.moments.count < 2 * SUBSETS[-1]:
        return f"{every.moments.count} samples are too few for a line through {len(SUBSETS)} numbers of them"
    mean, cov, root = gaussian
    value, error = frechet_distance_at_infinity(
        mean, cov, every.drawn, root=root, seed=measured.reference.settings.seed
    )
    return Measurement(value, error=error)


def distance_per_class_to(name: str, measured: Measured) -> Measurement | str | None:
    reference, every = measured.reference, measured.every
    if every is None or name not in reference.features:
        return no_images(name, reference) if every else None
    if measured.labels is None or name not in reference.labels:
        return f"the {'samples carry' if measured.labels is None else 'reference carries'} no labels"
    known = reference.features[name]
    theirs = reference.labels_as(measured.class_names)[name]
    of_classes = class_distances(known.rows, theirs, every.rows, measured.labels)
    return Measurement(fmean(of_classes.values()), classes={str(label): one for label, one in of_classes.items()})


def kernel_distance_to(name: str, measured: Measured) -> Measurement | str | None:
    reference = measured.reference
    if name not in reference.features:
        return no_images(name, reference)
    known = reference.vectors[name]
    own = reference.kernel_mean(name)
    value = kernel_distance(known, measured.rows, reference_mean=own, samples_mean=measured.kernel_mean)
    return Measurement(value, error=kernel_distance_error(known, measured.rows) if measured.every else None)


def no_images(name: str, reference: PreparedReference) -> str | None:
    """Why a metric of single images to this set is missing; None where there is no such set."""
    return "the reference holds statistics, no images" if name == "reference" and not reference.given.images else None


def one_of(name: str, index: int, measured: Measured) -> float | str:
    """A number of a pair that is calculated at once."""
    pair: tuple[float, float] | str = getattr(measured, name)
    return pair if isinstance(pair, str) else pair[index]


def copy_rate(kind: str, measured: Measured) -> float | str:
    copies = measured.copies[kind]
    return copies if isinstance(copies, str) else float(copies.double().mean())


def to_each(
    template: str, distance: Callable[[str, Measured], float | Measurement | str | None]
) -> dict[str, SampleMetric]:
    """The rows of a distance to each set of the reference."""
    endings = {"train": " train", "validation": " validation", "reference": ""}
    return {f"{template}{ending}": partial(distance, name) for name, ending in endings.items()}


SAMPLE_METRICS: dict[str, SampleMetric] = {
    **to_each("FD({network})", frechet_distance_to),
    **to_each("FD-infinity({network})", distance_at_infinity_to),
    **to_each("FD per class({network})", distance_per_class_to),
    **to_each("sFD({network})", spatial_distance_to),
    **to_each("KID({network})", kernel_distance_to),
    "IS({network})": lambda measured: measured.samples.scores.value if measured.samples.scores else None,
    "precision": partial(one_of, "precision_recall", 0),
    "recall": partial(one_of, "precision_recall", 1),
    "density": partial(one_of, "density_coverage", 0),
    "coverage": partial(one_of, "density_coverage", 1),
    "copy rate (features)": partial(copy_rate, "features"),
    "copy rate (tokens)": partial(copy_rate, "tokens"),
}
"""By name, in which {network} stands for that of the feature network; in the order of results.json."""


def key_of(template: str) -> str:
    """What a user writes for a metric and those of its family: fd, copy-rate, ..."""
    return template.partition("(")[0].strip().lower().replace(" ", "-")


def check_metrics(settings: EvaluationSettings) -> None:
    """Raises `UserError` for metrics that are not in the table, and for one that is given twice."""
    for metric in settings.metrics:
        check_choice("metrics", metric, dict.fromkeys(map(key_of, SAMPLE_METRICS)))
        if settings.metrics.count(metric) > 1:
            raise UserError(f"metrics: {metric!r} is given twice, in {','.join(settings.metrics)!r}; keep one")


def measure(
    samples: SampleSet,
    found: FeatureSet,
    reference: PreparedReference,
    copies: dict[str, CopyRate | str],
    part_of: Tensor,
) -> Iterator[tuple[dict[str, Measurement], dict[str, str]]]:
    """The metrics of all samples, then of each part (`part_of` of `extract_features`); and why others are missing."""
    settings = reference.settings
    some = found.first(settings.max_neighbours_images)
    vectors, of_vectors = some.drawn, part_of[some.indices][some.places[some.indices].argsort()]
    for index, statistics in enumerate((found, *found.parts), start=-1):
        members = part_of == index if index >= 0 else part_of >= -1  # (S,)
        of_members = {
            kind: copied if isinstance(copied, str) else copied.is_copy[members[copied.rows]]
            for kind, copied in copies.items()
        }
        rows = vectors if index < 0 else vectors[of_vectors == index]
        whole = found if index < 0 else None
        measured = Measured(reference, statistics, rows, of_members, whole, samples.labels, samples.class_names)
        values: dict[str, Measurement] = {}
        unavailable: dict[str, str] = {}
        for template, metric in SAMPLE_METRICS.items():
            if not settings.wants(key_of(template)):
                continue
            name, value = template.format(network=reference.network.name), metric(measured)
            if isinstance(value, str):
                unavailable[name] = value
            elif value is not None:
                values[name] = value if isinstance(value, Measurement) else Measurement(value)
        found_keys = {key_of(name) for name in (*values, *unavailable)}
        missing = [key for key in settings.metrics if key not in found_keys]  # asked for by name, so an answer is due
        yield values, unavailable | dict.fromkeys(missing, f"{reference.network.name} gives nothing it is made of")


def copy_rates(
    samples: SampleSet, found: FeatureSet, reference: PreparedReference, settings: EvaluationSettings
) -> dict[str, CopyRate | str]:
    """The copy rates in `features` and `tokens`, or why one cannot be measured; none where they are not wanted."""
    known, tokens = reference.features, reference.given.tokens
    if not settings.wants("copy-rate"):
        return {}
    if not {"train", "validation"} <= known.keys():
        return dict.fromkeys(("features", "tokens"), "the reference has no train and validation images")
    quantile, most = settings.copy_quantile, settings.max_neighbours_images
    found, train, validation = (kept.first(most) for kept in (found, known["train"], known["validation"]))
    held_out = reference.held_out.get
    near = copy_rate_features(found.rows, train.rows, validation.rows, quantile=quantile, held_out=held_out("features"))
    reference.held_out["features"] = near.held_out
    in_features = replace(near, indices=train.indices[near.indices], rows=found.indices)
    if samples.tokens is None or tokens is None:
        bare = "samples carry" if samples.tokens is None else "reference carries"
        return {"features": in_features, "tokens": f"the {bare} no tokens"}
    in_tokens = copy_rate_tokens(
        samples.tokens, tokens["train"], tokens["validation"], quantile=quantile, held_out=held_out("tokens")
    )
    reference.held_out["tokens"] = in_tokens.held_out
    return {"features": in_features, "tokens": in_tokens}
