"""The reference that samples are compared with, made ready for any number of them.

Shapes: `R` images of a set, `F` features.
"""

from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from consonar.data.labels import places_among
from consonar.distributed import ALONE, World
from consonar.errors import UserError
from consonar.evaluation.features import ImagesDone, cached_features
from consonar.evaluation.inputs import ReferenceSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import Moments, Target
from consonar.metrics.frechet import check_classes
from consonar.metrics.kernels import kernel_mean
from consonar.metrics.neighbours import nearest_distances
from consonar.networks import FeatureNetwork, ScoringNetwork
from consonar.networks.inception import FRONT_ENDS

OF_SCORES = frozenset(("sfd", "is"))
"""Metrics that a `ScoringNetwork` alone has."""
OF_IMAGES = frozenset(("fd-per-class", "kid", "precision", "recall", "density", "coverage", "copy-rate"))
"""Metrics that statistics alone cannot give."""
LARGEST = 1e30
"""Of the numbers of a Gaussian: the product of two covariances is calculated with."""


class PreparedReference:
    """What samples are compared with, in the features of one network: calculated once for any number of samples.

    `features` (`cached_features`) are those of each set of images by its name; `target` is for FD, `spatial` for sFD,
    None where the network or given statistics have none. `classes` are labels of samples and the names that they count,
    where known: the network sees no image before they match (`check_labels`). `UserError` for too few images, for
    statistics that are not of this network, and where it gives nothing that the metrics are made of.
    """

    def __init__(
        self,
        given: ReferenceSet,
        network: FeatureNetwork,
        settings: EvaluationSettings,
        progress: ImagesDone | None = None,
        world: World = ALONE,
        classes: tuple[Tensor | None, Sequence[str] | None] = (None, None),
    ) -> None:
        self.given, self.network, self.settings, k = given, network, settings, settings.num_neighbours
        check_measurable(given, network, settings)
        self.check_labels(*classes)
        keep = settings.kept_references
        self.features = {
            name: cached_features(network, images, settings, progress, max_rows=keep, world=world)
            for name, images in given.images.items()
        }
        for name, found in self.features.items():
            held_out = name == "validation" or not settings.wants("precision", "recall")
            need, use = (2, "a covariance") if held_out else (k + 1, f"precision and recall of {k} neighbours")
            if (count := found.moments.count) < need:
                raise UserError(f"reference {given.name}: {count} image(s) as {name}; {use} needs {need} or more")
        own = given_gaussian(given, given.statistics, network.name, network.num_features)
        gaussians = {name: (found.moments.mean, found.moments.cov) for name, found in self.features.items()}
        if own and self.features:
            check_own_statistics(given.name, own["reference"], self.features["reference"].moments)
        self.target = self.made_target(gaussians | own if settings.wants("fd", "fd-infinity") else {})
        self.spatial: Target | None = None
        if isinstance(network, ScoringNetwork) and (given.spatial_statistics or not given.statistics):
            spatial = {name: (kept.mean, kept.cov) for name, found in self.features.items() if (kept := found.spatial)}
            what = f"{network.name} (spatial)"
            spatial |= given_gaussian(given, given.spatial_statistics, what, network.num_spatial)
            self.spatial = self.made_target(spatial if settings.wants("sfd") else {})
        self.kernel_mean = cache(lambda name: kernel_mean(self.vectors[name]))
        self.held_out: dict[str, Tensor] = {}
        """By kind, the distances of the validation images that copy rates are measured by, once they are known."""

    def made_target(self, gaussians: dict[str, tuple[Tensor, Tensor]]) -> Target:
        try:
            return Target(gaussians)
        except UserError as error:  # of the matrix, which does not know whose it is
            raise UserError(f"reference {self.given.name}: {error}") from error

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """Of each set of images those (R, F) that samples are compared with one by one, in a drawn order."""
        most = self.settings.max_neighbours_images
        return {name: found.first(most).drawn for name, found in self.features.items()}

    @property
    def neighbours(self) -> Tensor | None:
        """The vectors for precision, recall, density and coverage; None where there are none."""
        return self.vectors.get("train", self.vectors.get("reference"))

    @cached_property
    def radii(self) -> dict[int, Tensor]:
        """By k, the squared distance of each of `neighbours` to its k-th nearest (R,); of sets with more than k."""
        rows = self.neighbours
        wanted = {self.settings.num_neighbours, self.settings.density_neighbours}
        if rows is None or not (possible := [k for k in wanted if k < len(rows)]):
            return {}
        nearest = nearest_distances(rows, max(possible))
        return {k: nearest[:, k - 1] for k in possible}

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """Of the images of each set that has them, (count,); of pictures that must be decoded for it, where they are
        wanted."""
        wanted = self.settings.wants("fd-per-class")
        sets = {name: one for name, one in self.given.images.items() if wanted or one.knows_labels}
        found = {name: images.labels() for name, images in sets.items()}
        return {name: labels for name, labels in found.items() if labels is not None and (labels >= 0).any()}

    def labels_as(self, class_names: Sequence[str] | None) -> dict[str, Tensor]:
        """`labels` that count `class_names`, where both sides name their classes; `UserError` for a class of the
        reference that is not among these."""
        found = dict(self.labels)
        for name, labels in found.items():
            own = self.given.images[name].class_names
            if own is not None and class_names is not None:
                where = f"fd-per-class: class of reference {self.given.name}, which the samples do not have"
                # The last place is that of -1, of a picture whose class is unknown.
                found[name] = torch.tensor((*places_among(class_names, own, where), -1))[labels.clamp(min=-1)]
        return found

    def check_labels(self, labels: Tensor | None, class_names: Sequence[str] | None) -> None:
        """Raises `UserError` where distances per class are wanted, of samples with labels (S,) of other classes."""
        if self.settings.wants("fd-per-class") and labels is not None and (labels >= 0).any():
            for known in self.labels_as(class_names).values():
                check_classes(known, labels)

    @property
    def noise_floor(self) -> dict[str, float]:
        """By metric, the Fréchet distances between the sets of the reference: what real images reach."""
        return {
            f"{kind}({self.network.name}) {name}": value
            for kind, target in (("FD", self.target), ("sFD", self.spatial))
            if target is not None
            for name, value in target.noise_floor().items()
        }


def check_measurable(given: ReferenceSet, network: FeatureNetwork, settings: EvaluationSettings) -> None:
    """Raises `UserError` where all that is asked for is made of what only other networks or references give."""
    asked, why = settings.metrics, dict[str, str]()
    if not isinstance(network, ScoringNetwork):
        choose = f"choose --feature-network {' or '.join(FRONT_ENDS)}"
        why |= dict.fromkeys(OF_SCORES, f"{network.name} gives nothing it is made of; {choose}")
    if not given.images:
        why |= dict.fromkeys(OF_IMAGES, f"reference {given.name} holds statistics, no images; name one of images")
    elif not {"train", "validation"} <= given.images.keys():
        why["copy-rate"] = f"reference {given.name} has no train and validation images; name one of both"
    if asked and why.keys() >= {*asked}:
        reasons = ", and ".join(dict.fromkeys(why[key] for key in asked))
        raise UserError(f"metrics: {','.join(asked)}: {reasons}, or other metrics")


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


def check_own_statistics(name: str, own: tuple[Tensor, Tensor], of_images: Moments) -> None:
    """Raises `UserError` where statistics and images of one file are too far apart to be of one data and network."""
    gap, spread = float((own[0] - of_images.mean).square().sum()), float(own[1].trace())
    if gap > max(0.25, 9 / of_images.count) * spread:  # of one data set 1 / count is expected
        raise UserError(
            f"reference {name}: its statistics are not of its images: squared distance of the means {gap:.3g} at a "
            f"variance of {spread:.3g}; are they of another feature network?"
        )
