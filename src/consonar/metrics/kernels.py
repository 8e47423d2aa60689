"""Kernel distance of two sets of features: the squared maximum mean discrepancy of Binkowski et al. 2018.

Source: arXiv 1801.01401, Eq. 4 with the kernel of their section 4; of Inception features it is called KID. Deviation:
the value is not the mean over random subsets (as there and in torch-fidelity: 100 of 1,000 images) but that over all
pairs. It is what the mean over subsets estimates, without the noise of drawing them, and of 10,000 images it costs as
much as a hundred subsets. Disjoint subsets of `SUBSET` images say how exact it is. Two sets of the same images are at
distance 0, where Eq. 4, which is for independent ones, would be below it.

Shapes: `S` samples, `R` reference images, `F` features, `L`, `R` rows of either side. Everything is on the CPU.
"""

from statistics import stdev

from torch import Tensor

from consonar.errors import UserError
from consonar.float32 import in_float32

BLOCK = 1024
"""Rows that are compared with as many others at a time."""
SUBSET = 1000
"""Images of a subset, as many as in the published protocol."""
SAME = 1e-10
"""Biased distance, beside the mean kernel, that the rounding of float32 features explains: it goes with its square. Of
n independent images some 1 / n is expected."""


@in_float32
def kernel_sum(left: Tensor, right: Tensor) -> float:
    """The sum of (x y / F + 1)^3 over all pairs of rows of (L, F) and (R, F), in float64."""
    total = 0.0  # of values that differ little between sets
    for rows in left.split(BLOCK):
        rows = rows.double()
        for others in right.split(BLOCK):
            total += float((rows @ others.double().T).div_(rows.shape[1]).add_(1).pow_(3).sum())
    return total


def kernel_mean(rows: Tensor) -> float:
    """The mean of the kernel over pairs of different rows of (R, F). Raises UserError for fewer than two."""
    if len(rows) < 2:
        raise UserError(f"KID: a set of {len(rows)} image(s); it needs at least 2")
    return (kernel_sum(rows, rows) - own_kernels(rows)) / (len(rows) * (len(rows) - 1))


def own_kernels(rows: Tensor) -> float:
    """The sum of the kernel of every row of (R, F) and itself."""
    return float((rows.double().square().sum(1) / rows.shape[1] + 1).pow(3).sum())


def kernel_distance(
    reference: Tensor, samples: Tensor, *, reference_mean: float | None = None, samples_mean: float | None = None
) -> float:
    """Unbiased squared MMD of (R, F) and (S, F) (Eq. 4): 0 on average for sets of one distribution, so below 0 as well;
    0 for sets of the same vectors in the same shares, which the biased one (Eq. 3, of all pairs) tells.

    `reference_mean`, `samples_mean` are the `kernel_mean` of either set where the caller has it. Raises UserError
    for a set of one.
    """
    own = kernel_mean(reference) if reference_mean is None else reference_mean
    means = [(reference, own), (samples, kernel_mean(samples) if samples_mean is None else samples_mean)]
    across = kernel_sum(samples, reference) / (len(samples) * len(reference))
    pairs = sum((mean * (len(rows) - 1) + own_kernels(rows) / len(rows)) / len(rows) for rows, mean in means)
    return 0.0 if pairs - 2 * across <= SAME * pairs else own + means[1][1] - 2 * across


def kernel_distance_error(reference: Tensor, samples: Tensor, size: int = SUBSET) -> float | None:
    """Standard error of `kernel_distance` of (R, F) and (S, F): that of the mean over disjoint subsets of `size` rows.

    The rows must be in a random order. None where the smaller set has fewer than two such subsets.
    """
    pairs = zip(reference.split(size), samples.split(size), strict=False)
    values = [kernel_distance(*pair) for pair in pairs if min(map(len, pair)) == size]
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
