"""Metrics by nearest neighbours in a space of features: precision and recall, density and coverage.

Sources: Kynkäänniemi et al. 2019 (arXiv 1904.06991, Eq. 1-3: improved precision and recall) with the protocol of the
ADM evaluator (guided-diffusion), Naeem et al. 2020 (arXiv 2002.09797, Eq. 3-4: density and coverage).

Deviations: distances are float64, never float16 as in ADM (which moves precision and recall by about 0.005), nor
float32, in which features far from 0 lose theirs. What the rounding of float32 features cannot tell apart is equal:
rows at such a distance are at distance 0, and a point so near to the border of a ball is on it. So no batch size, which
changes the last digits of features, moves a copy out of the ball of its original.

Shapes: `S` samples, `R` reference images, `F` features, `L`, `R` rows of either side. Everything is on the CPU.
"""

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.float32 import in_float32

BLOCK = 1024
"""Rows that are compared with all others at a time: memory is that of `BLOCK` x R float64 distances."""
SAME = 4 * torch.finfo(torch.float32).eps
"""Relative difference of two features that the rounding of a float32 network explains."""


@in_float32
def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """(L, R) float64 squared Euclidean distances of the rows of (L, F) and (R, F), never below 0."""
    distances = torch.empty(len(left), len(right), dtype=torch.float64)
    left = left.double()
    lengths = left.square().sum(1)[:, None]
    for start in range(0, len(right), BLOCK):  # copies in float64 are of these rows alone
        other = right[start : start + BLOCK].double()
        scale = lengths + other.square().sum(1)
        block = scale - 2 * (left @ other.T)
        distances[:, start : start + BLOCK] = block.where(block > SAME**2 * scale, 0.0)
    return distances


def neighbour_radii(features: Tensor, k: int = 3, block: int = BLOCK) -> Tensor:
    """(R,) squared distance of every row of (R, F) to its k-th nearest other row (Kynkäänniemi et al. 2019, Eq. 1).

    Raises UserError unless 1 <= k < R.
    """
    return nearest_distances(features, k, block)[:, -1]


def nearest_distances(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """(R, k) `neighbour_radii` of 1 to k, rising."""
    if not 1 <= k < len(features):
        raise UserError(f"num_neighbours: {k} of {len(features)} images; choose 1 to {len(features) - 1}")
    nearest = []
    for start in range(0, len(features), block):
        distances = squared_distances(features[start : start + block], features)  # (block, R)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf  # a row is not its own neighbour
        nearest.append(distances.topk(k, largest=False).values)
    return torch.cat(nearest)


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = 3, block: int = BLOCK, *, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 2-3), both in [0, 1], higher is better.

    Precision is the share of `samples` (S, F) inside the union of balls around the `reference` rows (R, F), each with
    the distance to its k-th nearest other row as radius (`reference_radii` where the caller has them); recall the same
    with the roles exchanged. A point on the border counts, as in ADM. Raises UserError when a set has no more than k
    rows.
    """
    inner = neighbour_radii(reference, k, block) if reference_radii is None else reference_radii  # (R,)
    sample_radii = neighbour_radii(samples, k, block)  # (S,)
    num_inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool)
    for start in range(0, len(samples), block):
        distances = squared_distances(samples[start : start + block], reference)  # (block, R)
        num_inside += int((distances <= inner * (1 + SAME)).any(1).sum())
        covered |= (distances <= sample_radii[start : start + block, None] * (1 + SAME)).any(0)
    return num_inside / len(samples), float(covered.double().mean())


def density_coverage(
    reference: Tensor, samples: Tensor, k: int = 5, block: int = BLOCK, *, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, Eq. 3 and 4), higher is better.

    Density is the number of balls of the `reference` rows (R, F) that a sample of (S, F) lies in, over k, on average:
    about 1 for samples of the reference's distribution, over 1 where they crowd where it is dense. Coverage is the
    share of balls that hold a sample, 0 to 1. Unlike recall both rest on the balls of real images alone. Balls are
    open, as in the authors' code: a set has density 1 to itself where no distances of a row are equal, and a row that
    is there more than k times has a ball of radius 0, which holds nothing. Raises UserError when the reference has no
    more than k rows.
    """
    radii = neighbour_radii(reference, k, block) if reference_radii is None else reference_radii  # (R,)
    num_inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool)
    for start in range(0, len(samples), block):
        inside = squared_distances(samples[start : start + block], reference) < radii * (1 - SAME)  # (block, R)
        num_inside += int(inside.sum())
        covered |= inside.any(0)
    return num_inside / (k * len(samples)), float(covered.double().mean())
