"""The distance of infinitely many samples, and distances of single classes."""

import numpy as np
import pytest
import torch

from consonar.errors import UserError
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.metrics.frechet import (
    check_classes,
    class_distances,
    frechet_distance_at_infinity,
    frechet_distance_of_rows,
)


def moments_of(rows):
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def by_moments(reference, samples):
    one, two = moments_of(reference), moments_of(samples)
    return frechet_distance(one.mean, one.cov, two.mean, two.cov)


@pytest.mark.parametrize("counts", [(50, 40), (5, 40), (50, 4), (6, 4), (2, 2)])
def test_a_distance_of_rows_is_that_of_their_gaussians(rng, counts):
    reference = torch.randn(counts[0], 12, generator=rng) * torch.linspace(0.1, 3, 12) + 100
    samples = torch.randn(counts[1], 12, generator=rng) + 101
    expected = by_moments(reference, samples)
    assert frechet_distance_of_rows(reference, samples) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance_of_rows(samples, reference) == pytest.approx(expected, rel=1e-7)
    for rows in (reference, samples):
        assert frechet_distance_of_rows(rows, rows[torch.randperm(len(rows), generator=rng)]) == 0
    with pytest.raises(UserError, match="a set of 1 image"):
        frechet_distance_of_rows(reference, samples[:1])


def test_the_distance_at_infinity_has_no_bias_and_a_true_error(rng):
    """Of Gaussians whose distance is known: what all samples score is far above it, the end of the line is not."""
    deviations, size, count = torch.logspace(0, -1, 40, dtype=torch.float64), 40, 400
    mean, cov = torch.zeros(size, dtype=torch.float64), deviations.square().diag()
    truth = 0.02**2 * size + float(((0.05 * deviations) ** 2).sum())  # of a shift by 0.02 and a scale of 1.05
    found, plain = [], []
    for _ in range(12):
        samples = 1.05 * torch.randn(count, size, generator=rng, dtype=torch.float64) * deviations + 0.02
        found.append(frechet_distance_at_infinity(mean, cov, samples))
        one = moments_of(samples)
        plain.append(frechet_distance(mean, cov, one.mean, one.cov))
    values, errors = np.array(found).T
    assert np.mean(plain) - truth > 5 * np.std(plain) / 12**0.5
    assert abs(values.mean() - truth) < 4 * errors.mean() / 12**0.5 < 0.5 * (np.mean(plain) - truth)
    assert 0.5 < errors.mean() / values.std() < 6  # rather too large than too small
    root = deviations.diag()
    assert frechet_distance_at_infinity(mean, cov, samples, root=root) == pytest.approx(found[-1], rel=1e-9)


@pytest.mark.parametrize("count", [16, 40, 100, 400])
def test_few_samples_have_an_error_that_covers_the_bias_that_is_left(rng, count):
    """Fewer samples than features: distances lie on a line that ends far above the truth, and the error says so."""
    deviations = torch.arange(1, 101, dtype=torch.float64) ** -0.5
    mean, cov = torch.zeros(100, dtype=torch.float64), deviations.square().diag()
    samples = 1.1 * torch.randn(count, 100, generator=rng, dtype=torch.float64) * deviations
    truth = float(((0.1 * deviations) ** 2).sum())
    value, error = frechet_distance_at_infinity(mean, cov, samples)
    assert abs(value - truth) < 2 * error
    assert count > 16 or (value > 20 * truth and error > 0.5 * value)


def test_what_cannot_be_extrapolated_is_refused(rng):
    with pytest.raises(UserError, match="fd-infinity: 7 samples; it needs at least 8"):
        frechet_distance_at_infinity(torch.zeros(3), torch.eye(3), torch.randn(7, 3, generator=rng))


def test_distances_of_classes(rng):
    reference, samples = torch.randn(60, 5, generator=rng), torch.randn(50, 5, generator=rng)
    theirs, ours = torch.arange(60) % 3, torch.arange(50) % 3
    samples[ours == 2] += 4
    found = class_distances(reference, theirs, samples, ours)
    assert found == {
        label: pytest.approx(by_moments(reference[theirs == label], samples[ours == label]), rel=1e-9)
        for label in range(3)
    }
    assert found[2] > 20 * max(found[0], found[1])
    order = torch.randperm(50, generator=rng)
    shuffled = class_distances(reference, theirs, samples[order], ours[order])
    assert shuffled == {label: pytest.approx(value, rel=1e-9) for label, value in found.items()}


@pytest.mark.parametrize(("theirs", "ours", "message"), [
    ([0, 0, 1, 1], [0, 0, 1, 1, 2, 2], "samples of 3 classes, a reference of 2; class 2 is on one side only"),
    ([0, 0, 1, 1], [0, 0], "samples of 1 classes, a reference of 2; class 1 is on one side only"),
    ([0, 0, 1, 1], [1, 1, 0], r"class 0 has 1 sample\(s\) and 2 image\(s\) of the reference; a covariance needs"),
])  # fmt: skip
def test_classes_that_do_not_match_are_one_line(theirs, ours, message):
    with pytest.raises(UserError, match=message) as caught:
        check_classes(torch.tensor(theirs), torch.tensor(ours))
    assert "\n" not in str(caught.value)
