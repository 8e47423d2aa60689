"""Moments, Fréchet distance, Inception score: closed forms, scipy (ADM: tests/parity)."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from consonar.errors import UserError
from consonar.metrics import distribution
from consonar.metrics.distribution import (
    InceptionScore,
    Moments,
    Target,
    frechet_distance,
    random_parts,
    symmetric_root,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def moments_of(*chunks):
    moments = Moments(chunks[0].shape[1])
    for chunk in chunks:
        moments.update(chunk)
    return moments


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_moments_equal_numpy_however_the_stream_is_cut(rng, block, monkeypatch):
    monkeypatch.setattr(distribution, "BLOCK", block)
    features = torch.randn(101, 7, generator=rng, dtype=torch.float64) * 3 + 5
    for sizes in ([101], [1] * 101, [50, 0, 51], [3, 98], [7] * 14 + [3]):
        moments = moments_of(*features.split(sizes))
        assert moments.count == 101
        assert np.allclose(moments.mean, features.mean(0), rtol=1e-13)
        assert np.allclose(moments.cov, np.cov(features.numpy(), rowvar=False), rtol=1e-11)


def test_moments_can_be_read_and_kept_on_the_way(rng, monkeypatch):
    monkeypatch.setattr(distribution, "BLOCK", 16)
    features = torch.randn(90, 5, generator=rng)
    first, second = features.double()[:50], features.double()
    moments = moments_of(*features[:50].split(9))
    mean, cov = moments.mean, moments.cov
    again = Moments.restored(moments.state())
    for each in (moments, again):
        for chunk in features[50:].split(11):
            each.update(chunk)
        assert each.count == 90 and torch.allclose(each.mean, second.mean(0), rtol=1e-13)
        assert torch.allclose(each.cov, second.T.cov(), rtol=1e-11)
    # What was read before does not change.
    assert torch.allclose(mean, first.mean(0), rtol=1e-13) and torch.allclose(cov, first.T.cov(), rtol=1e-11)


def test_moments_do_not_depend_on_later_changes_of_what_they_were_given(rng):
    features = torch.randn(20, 3, generator=rng)
    given = features.clone()
    moments = moments_of(given)
    given.zero_()
    assert torch.allclose(moments.mean, features.double().mean(0), rtol=1e-13)


def test_moments_are_stable_under_a_large_offset(rng):
    features = torch.randn(1000, 3, generator=rng, dtype=torch.float64)
    shifted = moments_of(*(features + 1e8).split(64))
    assert torch.allclose(
        shifted.cov, moments_of(features).cov, atol=1e-6
    )  # a raw sum of squares would lose everything


def test_moments_refuse_wrong_rows(rng):
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="features: values that are not finite"):
        Moments(3).update(torch.tensor([[0.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match="at least 2"):
        _ = moments_of(torch.zeros(1, 3)).cov


def test_frechet_distance_of_two_gaussians_in_closed_form():
    # Diagonal covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 0.5, 3.0])
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    expected = 9 + 16 + 9 + 2.25 + 9
    args = (mean1, deviation1.square().diag(), mean2, deviation2.square().diag())
    assert frechet_distance(*args) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(*args, root1=symmetric_root(args[1])) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_scipy_sqrtm(rng):
    first, second = (
        torch.randn(80, 12, generator=rng),
        torch.randn(60, 12, generator=rng) @ torch.randn(12, 12, generator=rng),
    )
    one, two = moments_of(first), moments_of(second)
    root = scipy.linalg.sqrtm(one.cov.numpy() @ two.cov.numpy()).real
    expected = float((one.mean - two.mean).square().sum() + one.cov.trace() + two.cov.trace() - 2 * np.trace(root))
    assert frechet_distance(one.mean, one.cov, two.mean, two.cov) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(two.mean, two.cov, one.mean, one.cov) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_covariances(rng):
    few = moments_of(torch.randn(5, 40, generator=rng))
    assert frechet_distance(few.mean, few.cov, few.mean, few.cov) == pytest.approx(0, abs=1e-5 * float(few.cov.trace()))
    # A Gaussian on the line e1 and one on the line e2: nothing overlaps, the traces remain.
    line1, line2 = torch.zeros(4, 4), torch.zeros(4, 4)
    line1[0, 0], line2[1, 1] = 4.0, 9.0
    assert frechet_distance(torch.zeros(4), line1, torch.zeros(4), line2) == pytest.approx(13)


def test_what_is_not_a_covariance_is_refused():
    mean, good = torch.zeros(2), torch.eye(2)
    with pytest.raises(UserError, match="smallest eigenvalue -1"):
        frechet_distance(mean, torch.diag(torch.tensor([1.0, -1.0])), mean, good)
    with pytest.raises(UserError, match="smallest eigenvalue"):
        frechet_distance(mean, good, mean, torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(UserError, match="not symmetric"):
        frechet_distance(mean, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), mean, good)
    with pytest.raises(UserError, match="another feature network"):
        frechet_distance(mean, good, torch.zeros(3), torch.eye(3))
    # Rounding of a float32 file passes and counts as zero.
    rounded = torch.diag(torch.tensor([1.0, -1e-8]))
    assert frechet_distance(mean, rounded, mean, rounded) == pytest.approx(0, abs=1e-7)


def inception_score(probabilities, split_size=5000):
    score = InceptionScore(torch.arange(len(probabilities)) // split_size)
    score.update(probabilities)
    return score.value


def test_inception_score_in_closed_form():
    assert inception_score(torch.full((8, 5), 0.2)) == pytest.approx(1)
    assert inception_score(torch.eye(5).repeat(3, 1)) == pytest.approx(5)  # certain and balanced; zeros are no NaN
    assert inception_score(torch.eye(4), split_size=1) == pytest.approx(1)


def test_random_parts_are_disjoint_and_equal():
    places = torch.tensor([3, 10, 0, 7, 1, 2, 9, 8, 4, 6, 5])
    assert random_parts(places, 3).tolist() == [0, -1, 0, 1, 1, 2, -1, 2, 1, 0, 2]
    assert random_parts(places[places < 2], 3).tolist() == [-1, -1]
    with pytest.raises(UserError, match="draws: 0"):
        random_parts(places, 0)


def test_a_prepared_target_gives_the_plain_functions_values(rng):
    train, samples = torch.randn(40, 5, generator=rng), torch.randn(30, 5, generator=rng) + 0.5
    one, two = moments_of(train), moments_of(samples)
    target = Target({"train": (one.mean, one.cov), "validation": (two.mean, two.cov)})
    expected = frechet_distance(one.mean, one.cov, two.mean, two.cov)
    assert target.distance("train", two) == pytest.approx(expected, rel=1e-12)
    assert target.distance("validation", two) == pytest.approx(0, abs=1e-9)
    assert target.distance("reference", two) is None
    assert target.noise_floor() == {"validation vs train": pytest.approx(expected, rel=1e-12)}
