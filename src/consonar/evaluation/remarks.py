"""What must be known to read the numbers of an evaluation: the bias of few images, copies that are not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from consonar.evaluation.features import FeatureSet
from consonar.evaluation.prepared import PreparedReference
from consonar.metrics.copying import CopyRate
from consonar.metrics.distribution import frechet_distance
from consonar.seeding import derive_seed

ENOUGH = 10
"""Samples for each feature from which on the bias of a Fréchet distance is not mentioned."""


def remarks(found: FeatureSet, reference: PreparedReference, copies: dict[str, CopyRate], seed: int) -> Iterator[str]:
    """One line each, of samples with these features and copy rates."""
    network, known, count = reference.network, reference.features, found.moments.count
    few, of_features = ENOUGH * network.num_features, f"{network.num_features:,} features"
    if count < few:
        name, (_, _, root) = next(iter(reference.target.gaussians.items()))
        perfect = distance_of_draws(root, count, derive_seed(seed, "draws"))
        yield (
            f"FD({network.name}) is biased upwards by few samples: {count:,} draws from the Gaussian of the {name} set "
            f"itself ({of_features}) score {perfect:.3g}; compare it at equal numbers of samples only"
        )
    sizes = {name: features.moments.count for name, features in known.items()}
    if small := [f"{name} {size:,}" for name, size in sizes.items() if size < few]:
        yield (
            f"FD({network.name}) is biased upwards by few images of the reference, too ({', '.join(small)}, "
            f"{of_features}); compare it at equal references only"
        )
    train = known.get("train")
    if train is not None and "validation" in known and len(train.rows) < train.moments.count:
        yield (
            f"copy rate (features) looks at {len(train.rows):,} of {train.moments.count:,} training images: copies of "
            "the others are not seen (max_neighbours_images says how many)"
        )
    for kind, copied in copies.items():
        if copied.threshold == 0:
            yield (
                f"copy rate ({kind}) cannot see a copy: a validation image is equal to a training image; keep it in "
                "one of the sets, or read the rate at another copy_quantile"
            )
    if found.scores and count < ENOUGH * (num_classes := found.scores.num_classes):
        yield f"IS({network.name}) is biased downwards: {count:,} samples for {num_classes:,} classes"


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
