"""Intervals and small estimators of the diagnostics. Pure functions.

Means over images get percentile bootstrap intervals (Efron 1979): one table of weights, its first row the plain mean,
so that whatever is calculated from means is calculated for all resamples at once, and differences are paired. A Fréchet
distance of few images is biased, and more so with images that come twice, so its interval comes from a delete-a-group
jackknife.

Letters: `n` images, `R` resamples, `D` inputs of a probe, `C` outputs, `m` rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consonar.diagnostics.findings import Interval
from consonar.float32 import in_float32
from consonar.metrics.shares import t_95
from consonar.seeding import generator, integers, permutation

RESAMPLES = 1000
GROUPS = 10
LEVEL = 0.95
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties of a probe, relative to the mean variance of its inputs."""


def bootstrap_weights(count: int, seed: int, name: str, resamples: int = RESAMPLES) -> Tensor:
    """(1 + R, n) float64 rows that sum to 1: the plain mean, then resamples of `count` images with replacement."""
    drawn = integers(generator(seed, "bootstrap", name), 0, count, resamples, count)
    counts, one = torch.zeros(1 + resamples, count, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    counts[0] = 1
    counts[1:].scatter_add_(1, drawn, one.expand(drawn.shape))
    return counts.div_(count)


def intervals(draws: Tensor) -> list[Interval]:
    """Of each column of (1 + R, K): its first row, and the percentiles of the others."""
    tail = (1 - LEVEL) / 2
    low, high = draws[1:].quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)
    return [Interval(*map(float, numbers)) for numbers in zip(draws[0], low, high, strict=True)]


def ratio(over: Tensor, under: Tensor) -> Interval | None:
    """Of draws (1 + R, 1) of two numbers, that below 0 or more; None where it is 0 in any, and no interval holds it."""
    return intervals(over / under)[0] if bool((under > 0).all()) else None


def mean_intervals(values: Tensor, weights: Tensor) -> list[Interval]:
    """Of the means over images of (n, K)."""
    return intervals(weights @ values.double())


def interpolated(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    """(R, K): in each row y at x (R, K), by straight lines through points (R, P) with rising x; flat beyond them."""
    known_x, x = known_x.contiguous(), x.contiguous()
    right = torch.searchsorted(known_x, x).clamp(1, known_x.shape[1] - 1)
    x0, x1, y0, y1 = (known.gather(1, at) for known in (known_x, known_y) for at in (right - 1, right))
    share = ((x - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    return y0 + share * (y1 - y0)


def groups_of(count: int, seed: int) -> Tensor:
    """(n,) int64: in which of up to `GROUPS` random groups of nearly equal size an image is."""
    groups = torch.empty(count, dtype=torch.int64)
    groups[permutation(generator(seed, "jackknife"), count)] = torch.arange(count) % min(GROUPS, count)
    return groups


def jackknife(statistic: Callable[[Tensor], Sequence[float]], groups: Tensor) -> list[Interval]:
    """Of each number that `statistic` gives for a choice of images (n,) bool: of all, ± t standard errors,
    t that of Student with g - 1 degrees of freedom.

    The error is that of the delete-a-group jackknife: (g - 1) / g times the squared deviations of the g numbers that
    leave one group out. Differences of numbers of one call are paired.
    """
    whole = torch.tensor(statistic(torch.ones_like(groups, dtype=torch.bool)), dtype=torch.float64)
    count = int(groups.max()) + 1
    parts = torch.stack([torch.tensor(statistic(groups != g), dtype=torch.float64) for g in range(count)])
    error = t_95(count - 1) * ((count - 1) / count * (parts - parts.mean(0)).square().sum(0)).sqrt()
    return [Interval(float(v), float(v - e), float(v + e)) for v, e in zip(whole, error, strict=True)]


def ranks(values: Tensor) -> Tensor:
    """Ranks (m,) float64 from 0, equal values sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts + 1) / 2)[inverse].double()


def rank_correlation(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(R,) Spearman correlation of the pairs x, y (n, P), of P pairs of an image, under weights of images (R, n):
    Pearson's of the ranks in all of them."""
    x, y = (ranks(of.flatten()).view_as(of) for of in (x, y))
    products = torch.stack([x, y, x * y, x.square(), y.square()], 2).mean(1)  # (n, 5)
    mean_x, mean_y, both, square_x, square_y = (weights @ products).unbind(1)
    covariance = both - mean_x * mean_y
    spread = ((square_x - mean_x.square()) * (square_y - mean_y.square())).clamp(min=0).sqrt()
    return torch.where(spread > 0, covariance / spread.clamp(min=1e-30), 0.0)


class Products:
    """What a ridge regression of outputs (C) on inputs (D) needs of rows that come batch by batch."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(num_inputs).double(), torch.zeros(num_outputs).double()
        self.xx = torch.zeros(num_inputs, num_inputs).double()
        self.xy = torch.zeros(num_inputs, num_outputs).double()
        self.yy = 0.0

    @in_float32
    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (m, D), y (m, C)."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0).cpu(), self.y + y.sum(0).cpu()
        self.xx, self.xy = self.xx + (x.T @ x).cpu(), self.xy + (x.T @ y).cpu()
        self.yy += float(y.square().sum())

    def ridge(self) -> tuple[Tensor, Tensor]:
        """Weights (D, C) and offset (C,), float32, of the penalty of `RIDGES` with the least generalised
        cross-validation error (Golub, Heath & Wahba 1979)."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        projected = vectors.T @ (self.xy / self.count - torch.outer(mean_x, mean_y))  # (D, C)
        power, scale = projected.square().sum(1), values.mean().clamp(min=1e-30)
        variance = self.yy / self.count - float(mean_y.square().sum())

        def error(penalty: float) -> float:
            shrunk = values + penalty * scale
            residual = variance - (power * (2 / shrunk - values / shrunk.square())).sum()
            freedom = (values / shrunk).sum() / self.count
            return float(residual / (1 - freedom).clamp(min=1e-6).square())

        best = min(RIDGES, key=error)
        weights = vectors @ (projected / (values + best * scale)[:, None])
        return weights.float(), (mean_y - mean_x @ weights).float()
