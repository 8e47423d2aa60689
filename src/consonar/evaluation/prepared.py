"""References made ready: their features, matrix roots and radii, calculated once for any number of sets of samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from consonar.errors import UserError
from consonar.evaluation.features import FeatureSet, ImagesDone, cached_features
from consonar.evaluation.inputs import ReferenceSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import Target
from consonar.networks.features import FeatureNetwork, ScoringNetwork

LARGEST = 1e30
"""Of the numbers of a Gaussian: the product of two covariances is calculated with."""


@dataclass(frozen=True)
class PreparedReference:
    """What samples are compared with, in the features of one network."""

    given: ReferenceSet
    network: FeatureNetwork
    features: dict[str, FeatureSet]
    """Of each set of images, by its name."""
    target: Target
    """Of the features: for FD, precision and recall."""
    spatial: Target | str | None
    """Of spatial features, for sFD; or why there is none. None: the network has none."""

    @property
    def noise_floor(self) -> dict[str, float]:
        """By metric, the Fréchet distances between the sets of the reference: what real images reach."""
        targets = {"FD": self.target, "sFD": self.spatial}
        return {
            f"{kind}({self.network.name}) {name}": value
            for kind, target in targets.items()
            if isinstance(target, Target)
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
        if found.moments.count < max(2, need):
            raise UserError(
                f"reference {reference.name}: {found.moments.count} image(s) as {name}; "
                f"{use} needs {max(2, need)} or more"
            )
    near = known.get("train") or known.get("reference")
    gaussians = {name: (found.moments.mean, found.moments.cov) for name, found in known.items()}
    gaussians |= given_gaussian(reference, reference.statistics, network.name, network.num_features)
    target = Target(gaussians, near.rows if near else None, k)
    return PreparedReference(reference, network, known, target, spatial_target(reference, network, known, k))


def spatial_target(
    reference: ReferenceSet, network: FeatureNetwork, known: dict[str, FeatureSet], k: int
) -> Target | str | None:
    """`PreparedReference.spatial`."""
    if not isinstance(network, ScoringNetwork):
        return None
    if reference.statistics and not reference.spatial_statistics:
        return "the reference's statistics have no mu_s and sigma_s"
    spatial = {name: (kept.mean, kept.cov) for name, found in known.items() if (kept := found.spatial)}
    spatial |= given_gaussian(reference, reference.spatial_statistics, f"{network.name} (spatial)", network.num_spatial)
    return Target(spatial, None, k)


def given_gaussian(
    reference: ReferenceSet, statistics: tuple[Tensor, Tensor] | None, network: str, num_features: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The Gaussian that the reference brings instead of images; UserError for what is not one of this network."""
    if statistics is None:
        return {}
    mean, cov = statistics
    where = f"reference {reference.name}"
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        swapped = "; are the two exchanged?" if mean.ndim == 2 and cov.ndim == 1 else ""
        raise UserError(
            f"{where}: mean {tuple(mean.shape)} and covariance {tuple(cov.shape)}; expected (F,) and (F, F){swapped}"
        )
    if len(mean) != num_features:
        raise UserError(f"{where}: {len(mean)} features, {network} has {num_features}")
    if not (mean.abs().max() <= LARGEST and cov.abs().max() <= LARGEST):
        raise UserError(f"{where}: its mean or covariance holds NaN or numbers over {LARGEST:g}; make it again")
    return {"reference": statistics}
