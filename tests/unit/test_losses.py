import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from consonar.seeding import choose
from consonar.training import losses
from consonar.training.losses import codebook_alignment_loss, entropy, next_token_accuracy, next_token_loss
from consonar.training.policy_gradient import token_log_probs


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


class Float32(TorchDispatchMode):
    """The most numbers that one float32 tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.most = max(self.most, result.numel())
        return result


OF_LOGITS = {
    "next_token_loss": lambda logits, tokens: next_token_loss(logits, tokens),
    "token_log_probs": lambda logits, tokens: token_log_probs(logits, torch.stack([tokens, tokens.flip(1)], 1), 0.7),
    "entropy": lambda logits, tokens: entropy(logits.detach()),
    "held entropy": lambda logits, tokens: losses.look(logits).with_gradient(tokens[:, None])[1].square(),
}


@pytest.mark.parametrize("name", OF_LOGITS)
def test_logits_in_bf16_have_no_float32_copy_and_the_numbers_of_one(name, rng, monkeypatch):
    """Of 12 rows of 40 logits, 2 at a time."""
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", 80)
    logits, tokens = torch.randn(3, 4, 40, generator=rng).mul(3).bfloat16(), torch.randint(40, (3, 4), generator=rng)
    of_bf16, of_float32 = logits.clone().requires_grad_(), logits.float().requires_grad_()
    found = {}
    for given in (of_bf16, of_float32):
        with Float32() as seen:
            result = found[given] = OF_LOGITS[name](given, tokens)
            if result.requires_grad:
                (result.sum() * 1.5).backward()
        assert (seen.most < logits.numel()) == (given is of_bf16)
    assert found[of_bf16].dtype == torch.float32
    torch.testing.assert_close(found[of_bf16], found[of_float32], rtol=1e-5, atol=1e-6)
    if name != "entropy":
        torch.testing.assert_close(of_bf16.grad, of_float32.grad.bfloat16(), rtol=2**-7, atol=1e-6)


def test_the_gradient_of_rows_in_turn_is_exact(rng, monkeypatch):
    """Against finite differences and PyTorch's own in float64; tokens may repeat in a place."""
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", 14)
    logits = torch.randn(5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 3], [6, 6], [1, 2], [5, 0], [4, 4]])
    ours = losses.log_probs(logits[None], tokens[None], 0.7)[0]
    torch.testing.assert_close(ours, F.log_softmax(logits / 0.7, -1).gather(-1, tokens))
    assert torch.autograd.gradcheck(lambda x: losses.log_probs(x[None], tokens[None], 0.7), logits)


@pytest.mark.parametrize("count", [0, 2])
def test_log_probs_and_entropy_share_an_exact_gradient(count, rng, monkeypatch):
    """Against finite differences in float64, of both together, of either alone, and of entropy without tokens."""
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", 14)
    logits = torch.randn(1, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (1, count, 5), generator=rng)

    def both(x):
        return losses.look(x, 0.7).with_gradient(tokens)

    torch.testing.assert_close(both(logits)[1], entropy(logits / 0.7))
    assert torch.autograd.gradcheck(lambda x: both(x)[1], logits)
    assert torch.autograd.gradcheck(both, logits)
    alone = torch.autograd.grad(both(logits)[1].square().sum(), logits)[0]
    torch.testing.assert_close(alone, torch.autograd.grad(entropy(logits / 0.7).square().sum(), logits)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_pass_finds_what_the_formulas_find_alone(temperature, rng, monkeypatch):
    """Draws by the same numbers, entropy, and log pi of any tokens; whatever rows are looked at together."""
    logits, numbers = torch.randn(3, 4, 40, generator=rng) * 3, torch.rand(3, 6, 4, generator=rng, dtype=torch.float64)
    drawn = choose((logits.double() / temperature).flatten(0, 1), numbers.transpose(1, 2).flatten(0, 1)).view(3, 4, 6)
    log_probs = (logits / temperature).log_softmax(-1).gather(-1, drawn)
    for at_once in (1, 200, 2**24):
        monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", at_once)
        seen = losses.look(logits, temperature, numbers)
        assert torch.equal(seen.drawn, drawn.transpose(1, 2))
        torch.testing.assert_close(seen.entropy, entropy(logits / temperature))
        torch.testing.assert_close(seen.log_probs(seen.drawn), log_probs.transpose(1, 2))
    assert losses.look(logits).drawn.shape == (3, 0, 4)


def test_a_look_draws_and_measures_alike_in_float64(rng):
    logits, uniforms = torch.randn(2, 3, 7, generator=rng), torch.rand(2, 4, 3, generator=rng, dtype=torch.float64)
    plain, double = (losses.look(x, uniforms=uniforms) for x in (logits, logits.double()))
    assert torch.equal(plain.drawn, double.drawn)
    torch.testing.assert_close(plain.entropy.double(), double.entropy.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(double.entropy, torch.distributions.Categorical(logits=logits.double()).entropy())
