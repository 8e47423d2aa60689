from typing import get_args

import pytest
import torch

from consonar.training.noise import Schedule, code_neighbours, corrupt_tokens, draw_noise_rates, max_noise_rate

TABLE = {
    "none": (0, 0, 0, 0),
    "constant": (0.5, 0.5, 0.5, 0.5),
    "uniform": (0.5, 0.5, 0.5, 0.5),
    "linear": (0.5, 0.3125, 0.125, 0),
    "truncated_linear": (0.5, 0.25, 0, 0),
}


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_schedule_table(schedule):
    values = [max_noise_rate(schedule, t, max_rate=0.5) for t in (0, 0.375, 0.75, 1)]
    assert values == pytest.approx(TABLE[schedule], abs=1e-15)


def test_published_schedule():
    """max(0, 1 - 4t/3)."""
    for t in (0, 0.1, 0.5, 0.74, 0.8):
        assert max_noise_rate("truncated_linear", t) == pytest.approx(max(0, 1 - 4 * t / 3))


def test_rates_are_uniform_up_to_the_cap_or_constant(rng):
    rates = draw_noise_rates("truncated_linear", 0.6, 20000, rng)
    assert rates.min() >= 0 and 0.599 < rates.max() < 0.6
    assert rates.mean().item() == pytest.approx(0.3, abs=5 * 0.6 / 12**0.5 / 20000**0.5)
    assert torch.equal(draw_noise_rates("constant", 0.6, 4, rng), torch.full((4,), 0.6))


@pytest.mark.parametrize("corruption", ["uniform", "mask", "nearest"])
def test_corruption_rates(corruption, rng):
    """Rate 0 changes nothing, rate 1 everything, p a share p within five standard deviations."""
    rates, length, vocab_size = torch.tensor([0.0, 0.3, 1.0]), 20000, 50
    tokens = torch.randint(vocab_size, (3, length), generator=rng)
    neighbours = code_neighbours(torch.randn(vocab_size, 4, generator=rng), 3)
    by = {"mask": {"mask_token": vocab_size}, "nearest": {"neighbours": neighbours}}.get(corruption, {})
    context, corrupted = corrupt_tokens(tokens, rates, vocab_size, rng, **by)
    deviation = 5 * (0.3 * 0.7 / length) ** 0.5
    assert corrupted.float().mean(1).tolist() == pytest.approx([0, 0.3, 1], abs=deviation)
    assert not corrupted[0].any() and corrupted[2].all()
    assert torch.equal(context[~corrupted], tokens[~corrupted])
    replaced, originals = context[corrupted], tokens[corrupted]
    if corruption == "mask":
        assert (replaced == vocab_size).all()
    elif corruption == "nearest":
        assert (neighbours[originals] == replaced[:, None]).any(1).all()
        assert (replaced != originals).all()
    else:
        same = (replaced == originals).float().mean().item()
        assert same == pytest.approx(1 / vocab_size, abs=5 * (1 / vocab_size / len(replaced)) ** 0.5)
        counts = replaced.bincount(minlength=vocab_size) / len(replaced)
        assert len(counts) == vocab_size and counts.min() > 0.5 / vocab_size


def test_corruption_is_a_function_of_the_generator():
    tokens, rates = torch.arange(40).view(2, 20), torch.full((2,), 0.5)
    first, second, other = (
        corrupt_tokens(tokens, rates, 40, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(tokens, torch.arange(40).view(2, 20))


def test_neighbours_on_a_line():
    codebook = torch.tensor([0.0, 1, 3, 7])[:, None]
    assert code_neighbours(codebook, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_a_code_is_never_its_own_neighbour_even_among_equal_codes(rng):
    codebook = torch.randn(20, 3, generator=rng)
    codebook[10:] = codebook[:10]
    neighbours = code_neighbours(codebook, 19)
    assert (neighbours != torch.arange(20)[:, None]).all()
    assert (neighbours.sort().values.diff() > 0).all()
