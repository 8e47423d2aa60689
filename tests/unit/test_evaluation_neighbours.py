"""Precision, recall, density and coverage against loops over pairs, far from 0, and with pictures that occur twice."""

import numpy as np
import pytest
import torch

from consonar.errors import UserError
from consonar.metrics.neighbours import density_coverage, neighbour_radii, precision_recall, squared_distances


def by_loops(reference, samples, k):
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020), pair by pair in numpy."""
    reference, samples = (rows.double().numpy() for rows in (reference, samples))

    def radius(rows, index):
        others = np.delete(rows, index, 0)
        return sorted(np.linalg.norm(others - rows[index], axis=1))[k - 1]

    real = [radius(reference, i) for i in range(len(reference))]
    fake = [radius(samples, j) for j in range(len(samples))]
    apart = np.array([[np.linalg.norm(x - y) for y in samples] for x in reference])  # (R, S)
    inside = apart < np.array(real)[:, None]
    return (
        np.mean([any(apart[i, j] <= real[i] for i in range(len(real))) for j in range(len(fake))]),
        np.mean([any(apart[i, j] <= fake[j] for j in range(len(fake))) for i in range(len(real))]),
        inside.sum(0).mean() / k,
        inside.any(1).mean(),
    )


@pytest.mark.parametrize(("offset", "dtype"), [(0, torch.float32), (0, torch.float64), (3000, torch.float32)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_they_equal_loops_over_pairs(rng, offset, dtype, k):
    """At 3,000 a float32 product of two rows is off by 100; the squared distances here are about 16."""
    reference = (torch.randn(60, 8, generator=rng) + offset).to(dtype)
    samples = (1.3 * torch.randn(45, 8, generator=rng) + 0.5 + offset).to(dtype)
    expected = by_loops(reference, samples, k)
    assert min(expected) > 0 and sorted(expected)[2] < 1  # numbers that say something
    for block in (7, 1024):
        assert precision_recall(reference, samples, k, block) == pytest.approx(expected[:2], rel=1e-12)
        assert density_coverage(reference, samples, k, block) == pytest.approx(expected[2:], rel=1e-12)
    radii = neighbour_radii(reference, k)
    assert density_coverage(reference, samples, k, reference_radii=radii) == pytest.approx(expected[2:], rel=1e-12)


def test_distances_far_from_zero(rng):
    rows = torch.randn(30, 64, generator=rng) + 1e4
    expected = (rows.double()[:, None] - rows.double()[None]).square().sum(-1)
    torch.testing.assert_close(squared_distances(rows, rows), expected, rtol=1e-6, atol=0)


def test_precision_and_recall_of_points_on_a_line():
    # Reference 0..3, radius 1 each for k = 1: it covers [-1, 4], borders included. Samples: two far away, two inside.
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[4.0], [0.5], [100.0], [101.0]])
    assert neighbour_radii(reference, 1).tolist() == [1, 1, 1, 1]
    assert neighbour_radii(samples, 1).tolist() == [3.5**2, 3.5**2, 1, 1]
    assert precision_recall(reference, samples, 1, block=3) == (0.5, 1.0)
    assert precision_recall(samples, reference, 1, block=3) == (1.0, 0.5)
    assert precision_recall(reference, reference, 2) == (1.0, 1.0)
    # Open balls: 4 is in none, 0.5 in two of them.
    assert density_coverage(reference, samples, 1) == (0.5, 0.5)


def test_copies_stay_where_they_are_whatever_rounding_does_to_them(rng):
    """Features of other batch sizes differ in their last digits; the originals' nearest are at a border each."""
    reference = torch.randn(200, 32, generator=rng) + 5
    reference[50:60] = reference[40:50]  # pictures that occur twice: balls of radius 0 for k = 1
    assert (neighbour_radii(reference, 1) == 0).sum() == 20
    for noise in (0.0, 1e-7):
        copies = reference * (1 + noise * torch.randn(reference.shape, generator=rng))
        assert precision_recall(reference, copies, 1) == precision_recall(reference, copies, 3) == (1, 1)
        density, coverage = density_coverage(reference, copies, 5)
        # Two equal pictures on the border of an open ball are both outside of it.
        assert density == density_coverage(reference, reference, 5)[0] and 0.97 < density < 1 and coverage == 1
    far = reference.clone()
    far[:100] += 50  # half of the samples: nothing is there
    assert density_coverage(reference, far, 5)[0] < 0.6 and precision_recall(reference, far)[0] == 0.5


def test_a_duplicate_is_a_neighbour_but_a_row_is_not_its_own():
    assert neighbour_radii(torch.tensor([[0.0], [0.0], [5.0]]), 1).tolist() == [0, 0, 25]


def test_too_few_rows_for_neighbours():
    with pytest.raises(UserError, match="num_neighbours: 3 of 3 images; choose 1 to 2"):
        neighbour_radii(torch.zeros(3, 2), 3)
