"""The parts of `evaluate`: references made ready, metrics of all samples or of some, and what must be said of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.evaluation.features import FeatureSet
from consonar.evaluation.inputs import ReferenceSet, SampleSet
from consonar.metrics.copying import CopyRate, copy_rate_features, copy_rate_tokens
from consonar.metrics.distribution import Target, frechet_distance
from consonar.networks.features import FeatureNetwork, ScoringNetwork
from consonar.seeding import derive_seed

LARGEST = 1e30
"""Of the numbers of a Gaussian: the product of two covariances is calculated with."""
ENOUGH = 10
"""Samples for each feature from which on the bias of a Fréchet distance is not mentioned."""


def prepare(
    network: FeatureNetwork, reference: ReferenceSet, known: dict[str, FeatureSet], k: int
) -> tuple[dict[str, Target], dict[str, str]]:
    """Targets `FD` and, of a `ScoringNetwork`, `sFD`; and why there is none."""
    for name, found in known.items():
        need, use = (2, "a covariance") if name == "validation" else (k + 1, f"precision and recall of {k} neighbours")
        if found.moments.count < max(2, need):
            raise UserError(
                f"reference {reference.name}: {found.moments.count} image(s) as {name}; "
                f"{use} needs {max(2, need)} or more"
            )
    near = known.get("train") or known.get("reference")
    features = {name: (found.moments.mean, found.moments.cov) for name, found in known.items()}
    features |= given_gaussian(reference, reference.statistics, network.name, network.num_features)
    targets = {"FD": Target(features, near.rows if near else None, k)}
    if not isinstance(network, ScoringNetwork):
        return targets, {}
    if reference.statistics and not reference.spatial_statistics:
        return targets, {f"sFD({network.name})": "the reference's statistics have no mu_s and sigma_s"}
    spatial = {name: (found.spatial[0].mean, found.spatial[0].cov) for name, found in known.items()}
    spatial |= given_gaussian(reference, reference.spatial_statistics, f"{network.name} (spatial)", network.num_spatial)
    return targets | {"sFD": Target(spatial, None, k)}, {}


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


def measure(
    targets: dict[str, Target], network: str, found: FeatureSet, part: int, copies: dict[str, CopyRate], members: Tensor
) -> dict[str, float]:
    """Metrics of all samples (`part` 0) or of one part (1, 2, ...); `members` (S,) bool says which samples they are."""
    moments = {"FD": (found.moments, *found.parts)[part]}
    if found.spatial:
        moments["sFD"] = found.spatial[part]
    values: dict[str, float] = {}
    for kind, target in targets.items():
        distances = target.frechet_distances(moments[kind])
        values |= {f"{kind}({network}) {name}".removesuffix(" reference"): value for name, value in distances.items()}
    if found.scores:
        values[f"IS({network})"] = found.scores[part].value
    values |= targets["FD"].precision_recall(found.rows[members[found.indices]])
    for kind, copied in copies.items():
        values[f"copy rate ({kind})"] = float(copied.is_copy[members[copied.rows]].double().mean())
    return values


def copy_rates(
    samples: SampleSet, found: FeatureSet, reference: ReferenceSet, known: dict[str, FeatureSet], quantile: float
) -> tuple[dict[str, CopyRate], dict[str, str]]:
    """The copy rates that can be measured, and why other metrics cannot."""
    without_images = "the reference holds statistics, no images"
    without_images = "the reference has validation images alone" if reference.images else without_images
    why = {} if known.keys() & {"train", "reference"} else dict.fromkeys(("precision", "recall"), without_images)
    if not {"train", "validation"} <= known.keys():
        reason = "the reference has no train and validation images"
        return {}, why | dict.fromkeys(("copy rate (features)", "copy rate (tokens)"), reason)
    train = known["train"]
    near = copy_rate_features(found.rows, train.rows, known["validation"].rows, quantile=quantile)
    copies = {"features": replace(near, indices=train.indices[near.indices], rows=found.indices)}
    if samples.tokens is None or reference.tokens is None:
        missing = "samples carry" if samples.tokens is None else "reference carries"
        return copies, why | {"copy rate (tokens)": f"the {missing} no tokens"}
    tokens = reference.tokens["train"], reference.tokens["validation"]
    return copies | {"tokens": copy_rate_tokens(samples.tokens, *tokens, quantile=quantile)}, why


def remarks(
    network: FeatureNetwork,
    targets: dict[str, Target],
    found: FeatureSet,
    known: dict[str, FeatureSet],
    seed: int,
    copies: dict[str, CopyRate],
) -> tuple[str, ...]:
    """What must be known to read the numbers, one line each: the bias of few samples, copies that are not seen."""
    said = []
    count, few = found.moments.count, ENOUGH * network.num_features
    if count < few:
        name, (_, _, root) = next(iter(targets["FD"].gaussians.items()))
        perfect = distance_of_draws(root, count, derive_seed(seed, "draws"))
        said.append(
            f"FD({network.name}) is biased upwards by few samples: {count:,} draws from the Gaussian of the {name} set "
            f"itself ({network.num_features:,} features) score {perfect:.3g}; "
            "compare it at equal numbers of samples only"
        )
    sizes = {name: features.moments.count for name, features in known.items()}
    if small := [f"{name} {size:,}" for name, size in sizes.items() if size < few]:
        said.append(
            f"FD({network.name}) is biased upwards by few images of the reference, too ({', '.join(small)}, "
            f"{network.num_features:,} features); compare it at equal references only"
        )
    train = known.get("train")
    if train is not None and "validation" in known and len(train.rows) < train.moments.count:
        said.append(
            f"copy rate (features) looks at {len(train.rows):,} of {train.moments.count:,} training images: copies of "
            "the others are not seen (max_neighbours_images says how many)"
        )
    said += [
        f"copy rate ({kind}) cannot see a copy: a validation image is equal to a training image; keep it in one of the "
        "sets, or read the rate at another copy_quantile"
        for kind, copied in copies.items()
        if copied.threshold == 0
    ]
    if found.scores and count < ENOUGH * (num_classes := found.scores[0].num_classes):
        said.append(f"IS({network.name}) is biased downwards: {count:,} samples for {num_classes:,} classes")
    return tuple(said)


def distance_of_draws(root: Tensor, count: int, seed: int) -> float:
    """Fréchet distance of `count` draws (2 or more) from a Gaussian to itself: what perfect samples would score.

    `root` (F, F) is the root of its covariance. The covariance of the draws comes from Bartlett's decomposition of the
    Wishart distribution, so that the cost does not depend on `count`.
    """
    rng, size = np.random.default_rng(seed), min(len(root), count - 1)
    lower = np.tril(rng.standard_normal((len(root), size)))
    lower[range(size), range(size)] = np.sqrt(rng.chisquare(count - 1 - np.arange(size)))
    spread = root @ torch.from_numpy(lower) / math.sqrt(count - 1)  # (F, size)
    mean = root @ torch.from_numpy(rng.standard_normal(len(root))) / math.sqrt(count)
    return frechet_distance(torch.zeros_like(mean), root @ root, mean, spread @ spread.T, root1=root)
