"""Statistics of feature vectors: streaming moments, Fréchet distance, Inception score.

Sources: Heusel et al. 2017 (arXiv 1706.08500, Eq. 6: Fréchet distance), Salimans et al. 2016 (arXiv 1606.03498:
Inception score), Chan et al. 1979 (merging of means and scatter matrices). The protocol is that of the ADM evaluator
(guided-diffusion).

Deviation from ADM: the trace of the matrix square root comes from the eigenvalues of a symmetric matrix, not of a
general one (same value, much faster, and no imaginary part for a singular covariance).

Shapes: `S` samples, `R` reference images, `F` features. Everything is on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError

BLOCK = 2048
"""Rows of features that are multiplied at a time."""
EPSILON = torch.finfo(torch.float64).eps
EIGENVALUE_TOLERANCE = 1e-6
"""Eigenvalues of a covariance down to -1e-6 times the largest count as rounding (float32 storage) and become 0."""


class Moments:
    """Mean and covariance of a stream of feature vectors in float64; its size depends on F only.

    Rows wait until there are about `BLOCK` of them: for fewer, the matrix that they are added to is what costs. Each
    block is centred on its own mean before it is added (Chan et al. 1979), so large means do not cancel.
    """

    def __init__(self, num_features: int) -> None:
        self.count = self._waiting = 0
        self._mean = np.zeros(num_features)  # (F,)
        self._scatter = np.zeros((num_features, num_features))  # (F, F) sum of centred products
        self._block = np.empty((0, num_features))  # (BLOCK + 1, F), the rows that wait and room for one more

    def update(self, features: Tensor) -> None:
        """Add the rows of `features` (B, F). Raises ValueError for another width, of its kind `UserError` for NaN."""
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (B, {len(self._mean)})")
        # By numpy, in one thread: for so few numbers the threads of torch wait longer for each other than they work.
        array = features.detach().to("cpu", torch.promote_types(features.dtype, torch.float32)).numpy()
        if not np.isfinite(array).all():
            raise UserError("features: values that are not finite; the network is damaged, or the pictures hold NaN")
        if len(self._block) == 0:
            self._block = np.empty((BLOCK + 1, len(self._mean)))
        for start in range(0, len(array), BLOCK):
            rows = array[start : start + BLOCK]
            if self._waiting + len(rows) > BLOCK:
                self._merge()
            self._block[self._waiting : self._waiting + len(rows)] = rows
            self._waiting += len(rows)
            self.count += len(rows)

    def _merge(self) -> None:
        rows, before = self._block[: self._waiting], self.count - self._waiting
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        delta = mean - self._mean
        rows -= mean
        self._block[len(rows)] = delta * (before * len(rows) / self.count) ** 0.5  # what the distance of the means adds
        centred = self._block[: len(rows) + 1]
        product = centred.T @ centred  # by numpy, which of such a product calculates one half
        product += self._scatter
        self._scatter = product
        self._mean = self._mean + delta * (len(rows) / self.count)
        self._waiting = 0

    def _finish(self) -> None:
        """Merges what waits; who reads is mostly done with the stream, so the memory of the rows goes back."""
        self._merge()
        self._block = self._block[:0].copy()

    @property
    def mean(self) -> Tensor:
        """(F,) float64."""
        self._finish()
        return torch.from_numpy(self._mean)

    @property
    def cov(self) -> Tensor:
        """(F, F) float64 covariance with ddof = 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, there are {self.count}")
        self._finish()
        return torch.from_numpy(self._scatter / (self.count - 1))

    def state(self) -> dict[str, np.ndarray]:
        """What `restored` makes equal ones of: `count` (), `mean` (F,) and `scatter` (F, F), sums of products."""
        self._finish()
        return {"count": np.array(self.count), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> Moments:
        moments = cls(len(state["mean"]))
        moments.count, moments._mean, moments._scatter = int(state["count"]), state["mean"], state["scatter"]
        return moments


def symmetric_root(cov: Tensor) -> Tensor:
    """The symmetric positive semi-definite square root of a covariance (F, F) of any rank, in float64.

    Raises UserError for a matrix that is not symmetric, not finite, or has an eigenvalue below -`EIGENVALUE_TOLERANCE`
    times the largest: such a matrix is not a covariance.
    """
    values, vectors = torch.linalg.eigh(_checked_symmetric(cov))
    values = _clipped(values)
    # What is left of an eigenvalue of 0 would have a root that is not small.
    values = values.where(values > len(values) * EPSILON * values[-1], 0.0)
    return (vectors * values.sqrt()) @ vectors.T


def covariance_root(cov: Tensor) -> Tensor:
    """A matrix R (F, F) with R R^T = `cov`, in float64: Cholesky's, a tenth of the work, where there is one, else the
    `symmetric_root`, which raises UserError for what is not a covariance."""
    lower, failed = torch.linalg.cholesky_ex(_checked_symmetric(cov))
    return symmetric_root(cov) if failed else lower


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, root1: Tensor | None = None) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, Eq. 6), 0 or more.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)), where the last trace is the sum of the square
    roots of the eigenvalues of the symmetric matrix R^T cov2 R with R R^T = cov1, `root1` where the caller has it.
    Means (F,), covariances (F, F), any float type, calculated in float64. A distance that is not large beside the
    rounding of those roots is calculated again from the singular values of the product of symmetric roots, which lose
    no digits; what that cannot tell from 0 is 0. Raises UserError when a matrix is not a covariance or widths differ.
    """
    if not (mean1.ndim == 1 and mean1.shape == mean2.shape and cov1.shape == cov2.shape == (len(mean1), len(mean1))):
        shapes = ", ".join(str(tuple(given.shape)) for given in (mean1, cov1, mean2, cov2))
        raise UserError(f"Fréchet distance: shapes {shapes} differ: statistics of another feature network?")
    root = covariance_root(cov1) if root1 is None else root1
    product = root.T @ _checked_symmetric(cov2) @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    # float64: the distance is a small difference of large traces.
    gap = float((mean1.double() - mean2.double()).square().sum())
    traces = float(cov1.double().trace() + cov2.double().trace())
    distance = gap + traces - 2 * float(_clipped(values).sqrt().sum())
    # An eigenvalue is off by F eps times the largest, so its root by up to the root of that, and there are F of them.
    if distance > 100 * len(mean1) * math.sqrt(len(mean1) * EPSILON * float(values[-1].clamp(min=0))):
        return distance
    root, other = symmetric_root(cov1), symmetric_root(cov2)
    traces = float(root.square().sum() + other.square().sum())
    distance = gap + traces - 2 * float(torch.linalg.svdvals(root @ other).sum())
    # Eigenvalues under F eps times the largest are noise (`symmetric_root`), and there are at most F of them.
    return distance if distance > len(mean1) ** 2 * EPSILON * traces else 0.0


def _checked_symmetric(cov: Tensor) -> Tensor:
    cov = cov.double()
    if not cov.isfinite().all():
        raise UserError("covariance: holds values that are not finite; were the features computed correctly?")
    asymmetry, scale = float((cov - cov.T).abs().max()), float(cov.abs().max())
    if asymmetry > EIGENVALUE_TOLERANCE * scale:
        raise UserError(f"covariance: not symmetric (differs by {asymmetry:.3g} at a scale of {scale:.3g})")
    return (cov + cov.T) / 2


def _clipped(values: Tensor) -> Tensor:
    """Ascending eigenvalues with rounding errors below zero set to zero; anything more negative is an error."""
    smallest, largest = float(values[0]), float(values[-1])
    if smallest < -EIGENVALUE_TOLERANCE * max(largest, 0.0):
        raise UserError(f"covariance: smallest eigenvalue {smallest:.3g}, largest {largest:.3g}: not a covariance")
    return values.clamp(min=0)


class Target:
    """Gaussians of a reference, (mean (F,), covariance (F, F)) by the name of the set, with their matrix roots, which
    are calculated once, however many sets of samples are compared. Raises UserError as `covariance_root` does."""

    def __init__(self, gaussians: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.gaussians = {name: (mean, cov, covariance_root(cov)) for name, (mean, cov) in gaussians.items()}

    def distance(self, name: str, moments: Moments) -> float | None:
        """`frechet_distance` of the samples with these moments to a set; None where there is none of this name."""
        if name not in self.gaussians:
            return None
        mean, cov, root = self.gaussians[name]
        return frechet_distance(mean, cov, moments.mean, moments.cov, root1=root)

    def noise_floor(self) -> dict[str, float]:
        """`validation vs train`: their distance, what real images reach; nothing without both sets."""
        if not {"train", "validation"} <= self.gaussians.keys():
            return {}
        (mean1, cov1, root), (mean2, cov2, _) = self.gaussians["train"], self.gaussians["validation"]
        return {"validation vs train": frechet_distance(mean1, cov1, mean2, cov2, root1=root)}


class InceptionScore:
    """Inception score (Salimans et al. 2016) of a stream of class probabilities; its size depends on the classes only.

    The mean over splits, however long; `split_of` (rows,) int64 says which split each row is in. Summed in float64.
    """

    def __init__(self, split_of: Tensor) -> None:
        self.split_of, self.count = split_of, 0
        self.splits: dict[int, tuple[int, Tensor, float]] = {}
        """By split: number of rows, sum of p(y|x), sum of p(y|x) log p(y|x)."""

    @classmethod
    def drawn(cls, places: Tensor, split_size: int = 5000) -> InceptionScore:
        """Over rows at these `places` (rows,) of a drawn order, all different: splits are of neighbours in it."""
        return cls(places.argsort().argsort() // split_size)

    def update(self, probabilities: Tensor) -> None:
        """Add rows (B, num_classes), each of which sums to one."""
        rows = probabilities.to("cpu", torch.float64)
        of_row = self.split_of[self.count : self.count + len(rows)]  # (B,)
        self.count += len(rows)
        for split in of_row.unique().tolist():
            part = rows[of_row == split]
            count, total, negative_entropy = self.splits.get(split, (0, torch.zeros(1, dtype=torch.float64), 0.0))
            # xlogy: a probability of exactly 0 contributes 0.
            negative_entropy += float(torch.special.xlogy(part, part).sum())
            self.splits[split] = count + len(part), total + part.sum(0), negative_entropy

    @property
    def sizes(self) -> list[int]:
        """Rows of every split."""
        return [count for count, _, _ in self.splits.values()]

    @property
    def num_classes(self) -> int:
        """Classes that the probabilities are of; 0 before there were rows."""
        return max((len(total) for _, total, _ in self.splits.values()), default=0)

    @property
    def value(self) -> float:
        """Mean over the splits of exp of the mean KL(p(y|x) || p(y)), 1 to num_classes. UserError without rows."""
        if not self.splits:
            raise UserError("Inception score: 0 rows; must be at least 1")
        scores = []
        for _, (count, total, negative_entropy) in sorted(self.splits.items()):
            marginal = total / count
            scores.append(math.exp(negative_entropy / count - float(torch.special.xlogy(marginal, marginal).sum())))
        return sum(scores) / len(scores)


def random_parts(places: Tensor, num_parts: int) -> Tensor:
    """(count,) int64: which of `num_parts` disjoint equal parts an item is in, by its place (count,) in a drawn order;
    -1: in none. The first items of the order are in all parts alike. UserError for no part."""
    if num_parts < 1:
        raise UserError(f"draws: {num_parts}; choose 1 or more")
    return (places % num_parts).where(places < len(places) // num_parts * num_parts, -1)
