"""Fréchet distances without the bias of few samples, and of single classes.

Sources: Chong & Forsyth 2020 (arXiv 1911.07023: FID at infinitely many samples, section 4), Heusel et al. 2017 (arXiv
1706.08500, Eq. 6). Deviations from Chong & Forsyth: the line is drawn through three points, the distance of all samples
and the mean distances of their halves and quarters, so that every sample counts at every size; theirs goes through
single random subsets of 15 sizes from a tenth of the samples on, where it is less of a line. Their low-discrepancy
sequences are drawn with a generator, not from its samples.

Shapes: `S` samples, `R` reference images, `F` features. Everything is on the CPU.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.metrics.distribution import EPSILON, Moments, covariance_root, frechet_distance
from consonar.seeding import derive_seed

SUBSETS = (1, 2, 4)
"""Into how many disjoint parts the samples are cut, for one point of the line each."""


def frechet_distance_at_infinity(
    mean: Tensor, cov: Tensor, samples: Tensor, *, root: Tensor | None = None, seed: int = 0
) -> tuple[float, float]:
    """The distance of infinitely many samples to the Gaussian `mean` (F,), `cov` (F, F), and its standard error.

    `samples` (S, F) are in a random order; `root` is that of `cov` where the caller has it. A distance of n samples is
    linear in 1/n where n is large (Chong & Forsyth 2020, Eq. 5); the value is where the line meets 1/n = 0, and may be
    below 0 by its error. The error has three parts, added as squares: that of the samples, whose effect is the same at
    every size (standard error of the mean of the quarters), that of the line (standard error of its intercept), and
    where the line ends for as many draws (by `seed`) from the Gaussian itself, whose distance is 0: far from it where
    samples are few beside the features, for then the bias is not of the form of a line. Samples that are the set that
    the Gaussian was fitted to are at distance 0 without an error. Raises UserError for fewer than 8 samples.
    """
    if len(samples) < 2 * SUBSETS[-1]:
        raise UserError(f"fd-infinity: {len(samples)} samples; it needs at least {2 * SUBSETS[-1]}")
    root = covariance_root(cov) if root is None else root
    sizes, distances, of_draws, smallest = [], [], [], [0.0]
    for count in SUBSETS:
        sizes.append(len(samples) // count)
        smallest = []
        for part in samples[: sizes[-1] * count].split(sizes[-1]):
            moments = Moments(samples.shape[1])
            moments.update(part)
            smallest.append(frechet_distance(mean, cov, moments.mean, moments.cov, root1=root))
        distances.append(fmean(smallest))
        if distances[0] == 0:
            return 0.0, 0.0
        of_draws.append(distance_of_draws(root, sizes[-1], derive_seed(seed, count)))
    value, of_line = line_end(sizes, distances)
    bias, _ = line_end(sizes, of_draws)
    return value, float((of_line**2 + bias**2 + stdev(smallest) ** 2 / len(smallest)) ** 0.5)


def line_end(sizes: Sequence[int], distances: Sequence[float]) -> tuple[float, float]:
    """Where the line through `distances` over 1 / `sizes` meets 0 (least squares), and its standard error."""
    design = np.stack([np.ones(len(sizes)), 1 / np.array(sizes)], 1)  # (points, 2)
    (intercept, _), residual, *_ = np.linalg.lstsq(design, np.array(distances))
    variance = float(residual[0]) / (len(sizes) - 2) if len(residual) else 0.0
    return float(intercept), float((variance * np.linalg.inv(design.T @ design)[0, 0]) ** 0.5)


def distance_of_draws(root: Tensor, count: int, seed: int) -> float:
    """Fréchet distance of `count` draws (2 or more) from a Gaussian to itself: what perfect samples would score.

    `root` (F, F) is the `covariance_root` of it. The covariance of the draws comes from Bartlett's decomposition of the
    Wishart distribution: no more columns than draws, whose products with the root have the eigenvalues that count.
    """
    rng, size = np.random.default_rng(seed), min(len(root), count - 1)
    lower = np.tril(rng.standard_normal((len(root), size)))
    lower[range(size), range(size)] = np.sqrt(rng.chisquare(count - 1 - np.arange(size)))
    spread = root @ torch.from_numpy(lower) / math.sqrt(count - 1)  # (F, size)
    mean = root @ torch.from_numpy(rng.standard_normal(len(root))) / math.sqrt(count)
    cross = root.T @ spread
    overlap = torch.linalg.eigvalsh(cross.T @ cross).clamp(min=0).sqrt().sum()  # as in `frechet_distance`
    return max(0.0, float(mean.square().sum() + root.square().sum() + spread.square().sum() - 2 * overlap))


def frechet_distance_of_rows(reference: Tensor, samples: Tensor) -> float:
    """`frechet_distance` of the Gaussians fitted to the rows of (R, F) and (S, F), 0 or more, at the cost of few rows.

    tr((C1 C2)^(1/2)) is the sum of the singular values of X Y^T / sqrt((R - 1)(S - 1)), where X and Y are the centred
    rows, or of triangular factors of no more than F rows in their place. Raises UserError for a set of one.
    """
    if (count := min(len(reference), len(samples))) < 2:
        raise UserError(f"Fréchet distance: a set of {count} image(s); a covariance needs at least 2")
    means, factors = [], []
    for rows in (reference.double(), samples.double()):
        means.append(rows.mean(0))
        centred = (rows - means[-1]) / (len(rows) - 1) ** 0.5
        factors.append(torch.linalg.qr(centred, "r").R if len(rows) > rows.shape[1] else centred)
    traces = float(sum(factor.square().sum() for factor in factors))
    overlap = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    distance = float((means[0] - means[1]).square().sum()) + traces - 2 * overlap
    return distance if distance > reference.shape[1] ** 2 * EPSILON * traces else 0.0


def class_distances(
    reference: Tensor, reference_labels: Tensor, samples: Tensor, sample_labels: Tensor
) -> dict[int, float]:
    """`frechet_distance_of_rows` within every class: rows (R, F), (S, F) and their labels (R,), (S,), integers,
    without those whose label is below 0, which is none.

    Raises UserError as `check_classes` does.
    """
    check_classes(reference_labels, sample_labels)
    return {
        label: frechet_distance_of_rows(reference[reference_labels == label], samples[sample_labels == label])
        for label in sample_labels[sample_labels >= 0].unique().tolist()
    }


def check_classes(reference_labels: Tensor, sample_labels: Tensor) -> None:
    """Raises UserError where labels (R,) and (S,) are of other classes, or one side has a class of one image."""
    theirs, ours = (Counter(labels[labels >= 0].tolist()) for labels in (reference_labels, sample_labels))
    if only := sorted(theirs.keys() ^ ours.keys()):
        raise UserError(
            f"fd-per-class: samples of {len(ours)} classes, a reference of {len(theirs)}; class {only[0]} is on one "
            "side only: measure against images of the same classes"
        )
    for label, count in ours.items():
        if min(count, theirs[label]) < 2:
            sides = f"{count} sample(s) and {theirs[label]} image(s) of the reference"
            raise UserError(f"fd-per-class: class {label} has {sides}; a covariance needs at least 2")
