"""Copy rates by Hamming and cosine distance on sets whose nearest neighbours are known by construction."""

from types import SimpleNamespace

import pytest
import torch

from consonar.errors import UserError
from consonar.evaluation import sample_metrics
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics import copying, kernels
from consonar.metrics.copying import copy_rate_features, copy_rate_tokens, hamming_distances


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def changed(tokens, count):
    """The same tokens with the first `count` of them replaced."""
    other = tokens.clone()
    other[..., :count] += 1
    return other


def test_hamming_distance_counts_differing_tokens(rng):
    for num_tokens in (9, 600):  # beyond what a byte can count
        left = torch.randint(5, (6, num_tokens), generator=rng)
        right = torch.randint(5, (4, num_tokens), generator=rng)
        assert torch.equal(hamming_distances(left, right), (left[:, None] != right[None]).sum(-1).to(torch.int16))


@pytest.mark.parametrize("scale", [1, 3_000, 70_000])  # uint8, int16 and int32 inside
@pytest.mark.parametrize("block", [2, 1024])
def test_a_sample_is_a_copy_when_strictly_nearer_than_every_validation_image(scale, block, monkeypatch):
    monkeypatch.setattr(copying, "BLOCK", block)
    train = torch.arange(5)[:, None].expand(5, 8) * 2 * scale  # (5, 8): no two images share a token
    validation = torch.stack([changed(train[0], 6), changed(train[1], 3), changed(train[2], 8)])
    samples = torch.stack([train[4], changed(train[3], 2), changed(train[1], 3), changed(train[0], 8)])
    result = copy_rate_tokens(samples, train, validation)
    assert result.threshold == 3
    assert result.distances.tolist() == [0, 2, 3, 8]
    assert result.is_copy.tolist() == [True, True, False, False]
    assert result.indices[:3].tolist() == [4, 3, 1]


def test_the_nearest_view_of_an_image_counts():
    first, second = torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), 5)
    first[1] = torch.tensor([1, 2, 3, 4])  # the flipped view
    train = torch.stack([first, second])  # (2 images, 2 views, 4 tokens)
    validation = torch.stack([torch.full((2, 4), 9), torch.tensor([[9, 9, 9, 9], [5, 5, 9, 9]])])
    result = copy_rate_tokens(torch.tensor([[1, 2, 3, 9], [5, 5, 9, 9]]), train, validation)
    assert result.threshold == 2  # the second view of the second validation image
    assert result.distances.tolist() == [1, 2]
    assert result.indices.tolist() == [0, 1]
    assert result.is_copy.tolist() == [True, False]


def test_the_quantile_makes_the_threshold_robust_against_one_near_duplicate():
    train = torch.zeros(1, 10, dtype=torch.int64)
    validation = torch.stack([changed(train[0], count) for count in (0, 4, 5, 6, 7)])  # the first one is a duplicate
    samples = torch.stack([changed(train[0], count) for count in (0, 3, 5)])
    assert not copy_rate_tokens(samples, train, validation).is_copy.any()  # nothing is nearer than 0
    robust = copy_rate_tokens(samples, train, validation, quantile=0.25)
    assert (robust.threshold, robust.quantile, robust.is_copy.tolist()) == (4, 0.25, [True, True, False])


@pytest.mark.parametrize("block", [1, 1024])
def test_cosine_distance_ignores_length(block, monkeypatch):
    monkeypatch.setattr(copying, "BLOCK", block)
    train = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    validation = torch.tensor([[3.0, 3.0]])  # 45 degrees from both
    samples = torch.tensor([[10.0, 0.0], [1.0, 3.0], [-1.0, -1.0]])
    result = copy_rate_features(samples, train, validation)
    assert result.threshold == pytest.approx(1 - 0.5**0.5, abs=1e-6)
    assert result.distances.tolist() == pytest.approx([0, 1 - 3 / 10**0.5, 1 + 0.5**0.5], abs=1e-6)
    assert result.is_copy.tolist() == [True, True, False]
    assert result.indices[:2].tolist() == [0, 1]


def test_validation_images_themselves_are_never_copies(rng):
    train, validation = torch.randn(50, 6, generator=rng), torch.randn(20, 6, generator=rng)
    assert not copy_rate_features(validation, train, validation).is_copy.any()
    assert copy_rate_features(train, train, validation).is_copy.all()


@pytest.mark.parametrize("block", [7, 1024])
def test_a_repeated_training_image_makes_the_threshold_zero_and_not_its_rounding(rng, block, monkeypatch):
    monkeypatch.setattr(copying, "BLOCK", block)
    train = torch.randn(200, 1280, generator=rng)
    for row in range(40):
        result = copy_rate_features(3.7 * train, train, 1.3 * train[row : row + 1])
        assert result.threshold == 0 and not result.is_copy.any() and not result.distances.any()


def test_wrong_input_is_named():
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="same tokenizer"):
        copy_rate_tokens(tokens, tokens[:, :2], tokens)
    with pytest.raises(UserError, match="same feature network"):
        copy_rate_features(torch.ones(3, 4), torch.ones(3, 5), torch.ones(3, 4))
    with pytest.raises(UserError, match=r"copy_quantile: 1\.5"):
        copy_rate_tokens(tokens, tokens, tokens, quantile=1.5)
    with pytest.raises(UserError, match="0 validation images"):
        copy_rate_tokens(tokens, tokens, tokens[:0])
    with pytest.raises(UserError, match="length 0"):
        copy_rate_features(torch.zeros(1, 4), torch.ones(3, 4), torch.ones(3, 4))


def test_what_does_not_depend_on_the_samples_is_calculated_once(monkeypatch):
    """The distances of the validation images, for any number of samples; the kernel of samples, for any set."""
    rng, asked = torch.Generator().manual_seed(0), []
    sets = {name: torch.randn(count, 6, generator=rng) for name, count in (("train", 9), ("validation", 5))}
    tokens = {name: torch.randint(4, (len(rows), 8), generator=rng) for name, rows in sets.items()}

    class Kept(SimpleNamespace):
        def first(self, count):
            return self

    features = {name: Kept(rows=rows, indices=torch.arange(len(rows))) for name, rows in sets.items()}
    reference = SimpleNamespace(features=features, given=SimpleNamespace(tokens=tokens), held_out={}, vectors=sets)
    reference.kernel_mean = {name: kernels.kernel_mean(rows) for name, rows in sets.items()}.__getitem__

    def counting(inner):
        def count(left, right, *more):
            asked.append((len(left), len(right)))
            return inner(left, right, *more)

        return count

    monkeypatch.setattr(copying, "_nearest", counting(copying._nearest))
    monkeypatch.setattr(kernels, "kernel_sum", counting(kernels.kernel_sum))
    for count in (3, 4):
        rows, drawn = torch.randn(count, 6, generator=rng), torch.randint(4, (count, 8), generator=rng)
        found = Kept(rows=rows, indices=torch.arange(count))
        rates = sample_metrics.copy_rates(SimpleNamespace(tokens=drawn), found, reference, EvaluationSettings())
        alone = {"features": copy_rate_features(rows, **sets), "tokens": copy_rate_tokens(drawn, **tokens)}
        for kind, rate in alone.items():
            assert rates[kind].threshold == rate.threshold and torch.equal(rates[kind].distances, rate.distances)
    assert asked.count((5, 9)) == 2 + 4, "of either kind, and each time alone"
    asked.clear()
    measured = sample_metrics.Measured(reference, None, sets["train"][:4], {})
    for name in sets:
        value = sample_metrics.kernel_distance_to(name, measured).value
        assert value == kernels.kernel_distance(sets[name], sets["train"][:4])
    assert asked.count((4, 4)) == 1 + 2, "and each time alone"
