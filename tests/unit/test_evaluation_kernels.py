"""Kernel distance: against its definition by loops, as the mean over all subsets, without bias, and its error."""

import itertools

import numpy as np
import pytest
import torch

from consonar.errors import UserError
from consonar.metrics import kernels
from consonar.metrics.kernels import kernel_distance, kernel_distance_error, kernel_mean


def by_loops(reference, samples):
    """Eq. 4 of Binkowski et al. 2018, pair by pair."""
    x, y = reference.double().numpy(), samples.double().numpy()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    within = [np.mean([k(a, b) for a, b in itertools.permutations(rows, 2)]) for rows in (x, y)]
    return within[0] + within[1] - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("block", [5, 1024])
def test_it_equals_loops_over_pairs(rng, block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    for offset in (0, 30):
        reference = torch.randn(14, 6, generator=rng) + offset
        samples = torch.randn(11, 6, generator=rng) * 1.5 + 0.2 + offset
        expected = by_loops(reference, samples)
        assert kernel_distance(reference, samples) == pytest.approx(expected, rel=1e-9)
        known = kernel_mean(reference)
        assert kernel_distance(reference, samples, reference_mean=known) == pytest.approx(expected, rel=1e-9)
        assert kernel_distance(samples, reference) == pytest.approx(expected, rel=1e-9)


def test_it_is_the_mean_over_all_subsets(rng):
    """What the mean over random subsets of the published protocol estimates."""
    reference, samples = torch.randn(6, 4, generator=rng), torch.randn(5, 4, generator=rng) + 0.5
    subsets = [
        by_loops(reference[list(some)], samples[list(others)])
        for some in itertools.combinations(range(6), 3)
        for others in itertools.combinations(range(5), 3)
    ]
    assert kernel_distance(reference, samples) == pytest.approx(np.mean(subsets), rel=1e-9)


def test_few_samples_do_not_bias_it_and_its_error_is_true(rng):
    found = []
    for _ in range(60):
        reference, samples = (torch.randn(40, 8, generator=rng) for _ in range(2))
        found.append((kernel_distance(reference, samples), kernel_distance_error(reference, samples, 8)))
    values, errors = np.array(found).T
    assert abs(values.mean()) < 4 * values.std() / 60**0.5 and (values < 0).any() and (values > 0).any()
    # Of subsets of 8 the distance varies more than a fifth of that of 40: an upper bound, of the right size.
    assert values.std() * 0.8 < errors.mean() < values.std() * 3
    assert kernel_distance(reference, samples + 1) > 5 * errors.max()


def test_a_set_is_at_distance_zero_from_itself_alone(rng):
    """Eq. 4 is below 0 there, as the sets are not independent; a set that differs in one image of many is not it."""
    rows = torch.randn(500, 8, generator=rng)
    rounded = rows[torch.randperm(500, generator=rng)] * (1 + 1e-6 * torch.randn(500, 8, generator=rng))
    assert by_loops(rows[:40], rows[:40]) < -0.1 and kernel_distance(rows, rounded) == kernel_distance(rows, rows) == 0
    assert kernel_distance_error(rows, rows, 100) == 0
    rounded[0] += 1
    assert kernel_distance(rows, rounded) != 0


def test_sets_of_one_and_subsets_that_are_too_few(rng):
    one, many = torch.randn(1, 3, generator=rng), torch.randn(7, 3, generator=rng)
    for pair in ((one, many), (many, one)):
        with pytest.raises(UserError, match=r"KID: a set of 1 image\(s\); it needs at least 2"):
            kernel_distance(*pair)
    assert kernel_distance_error(many, many, 4) is None and kernel_distance_error(many, many[:5], 2) is not None
