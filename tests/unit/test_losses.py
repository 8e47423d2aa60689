import math

import pytest
import torch

from consonar.training.losses import codebook_alignment_loss, entropy, next_token_accuracy, next_token_loss


def test_next_token_loss_of_known_distributions():
    tokens = torch.tensor([[0, 3], [2, 1]])
    assert next_token_loss(torch.zeros(2, 2, 4), tokens).item() == pytest.approx(math.log(4))
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(2, 2, 4)
    expected = math.log(2) * (1 + 3 + 3 + 2) / 4
    assert next_token_loss(probabilities, tokens).item() == pytest.approx(expected)
    assert next_token_loss(probabilities.bfloat16(), tokens).dtype == torch.float32


def test_accuracy():
    logits = torch.eye(3)[None]
    assert next_token_accuracy(logits, torch.tensor([[0, 1, 0]])).item() == pytest.approx(2 / 3)


def test_entropy():
    logits = torch.stack([torch.zeros(4), torch.tensor([0.5, 0.5, 1e-30, 1e-30]).log(), torch.tensor([100.0, 0, 0, 0])])
    expected = torch.tensor([[math.log(4), math.log(2), 0]])
    torch.testing.assert_close(entropy(logits[None]), expected)


def test_alignment_of_parallel_orthogonal_and_opposite_vectors():
    codes = torch.tensor([[[1.0, 0], [1, 0], [1, 0]]])
    predicted = torch.tensor([[[5.0, 0], [0, 2], [-1, 0]]])
    assert codebook_alignment_loss(predicted, codes).item() == pytest.approx((0 + 1 + 2) / 3)
    # Left-out positions count as 0 and the mean still divides by all.
    keep = torch.tensor([[True, True, False]])
    assert codebook_alignment_loss(predicted, codes, keep).item() == pytest.approx(1 / 3)


def test_alignment_gives_codes_no_gradient(rng):
    predicted, codes = (torch.randn(2, 3, 4, generator=rng, requires_grad=True) for _ in range(2))
    keep = torch.tensor([[True, False, True]] * 2)
    codebook_alignment_loss(predicted, codes, keep).backward()
    assert codes.grad is None
    assert torch.equal(predicted.grad.abs().sum(-1) > 0, keep)
