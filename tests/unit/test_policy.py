"""Estimators in closed form: a two-token bandit has a known gradient."""

import math
from typing import get_args

import pytest
import torch

from consonar.seeding import generator
from consonar.training import losses
from consonar.training import policy_gradient as policy


def test_draws_follow_the_distribution(rng):
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, -30.0, 0.0]]])  # (1, 2, 3)
    uniforms = torch.rand(1, 40_000, 2, generator=rng, dtype=torch.float64)
    actions = losses.look(logits, uniforms=uniforms).drawn
    for token in range(2):
        share = torch.bincount(actions[0, :, token], minlength=3) / 40_000
        torch.testing.assert_close(share, logits[0, token].softmax(-1), atol=0.01, rtol=0)
    colder = losses.look(logits, 0.5, uniforms).drawn
    share = torch.bincount(colder[0, :, 0], minlength=3) / 40_000
    torch.testing.assert_close(share, (logits[0, 0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_a_draw_depends_on_its_own_numbers_alone(rng):
    logits = torch.randn(3, 5, 7, generator=rng)
    uniforms = torch.rand(3, 4, 5, generator=rng, dtype=torch.float64)
    whole = losses.look(logits, uniforms=uniforms).drawn
    assert torch.equal(whole[1:2, 2:3], losses.look(logits[1:2], uniforms=uniforms[1:2, 2:3]).drawn)
    assert losses.look(logits, uniforms=torch.zeros_like(uniforms)).drawn.max() == 0
    nearly_one = torch.full_like(uniforms, 1 - 2**-53)
    assert losses.look(logits, uniforms=nearly_one).drawn.min() == 6


def test_log_probs_are_those_of_the_drawn_tokens(rng):
    logits = torch.randn(2, 3, 5, generator=rng)
    actions = torch.randint(5, (2, 4, 3), generator=rng)
    found = policy.token_log_probs(logits, actions, 0.7)
    for b, g, n in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        expected = (logits[b, n] / 0.7).log_softmax(-1)[actions[b, g, n]]
        torch.testing.assert_close(found[b, g, n], expected)


REWARDS = torch.tensor([[1.0, 2.0, 6.0, 3.0]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 3 / math.sqrt(14 / 3), 0.0]),
        ("gspo", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 3 / math.sqrt(14 / 3), 0.0]),
        ("dapo", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 3 / math.sqrt(14 / 3), 0.0]),
        ("dr_grpo", [-2.0, -1.0, 3.0, 0.0]),
        ("rloo", [1 - 11 / 3, 2 - 10 / 3, 6 - 2.0, 3 - 3.0]),
        ("reinforce", [-1.5, -0.5, 3.5, 0.5]),
    ],
)
def test_advantages_in_closed_form(estimator, expected):
    found = policy.group_advantages(REWARDS, estimator, baseline=2.5)
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_every_estimator_is_tested_in_closed_form():
    cases = {mark.args[1][i][0] for mark in test_advantages_in_closed_form.pytestmark for i in range(6)}
    assert cases == set(get_args(policy.Estimator))


def test_advantages_are_clamped_and_zero_without_spread():
    many = torch.zeros(1, 100)
    many[0, 0] = 1.0  # 9.9 standard deviations above the mean
    assert policy.group_advantages(many, "grpo").max() == 5
    assert policy.group_advantages(many, "grpo", clamp=0).max() > 9
    assert policy.group_advantages(many, "grpo", clamp=2).max() == 2
    assert torch.equal(policy.group_advantages(torch.full((2, 4), 0.3), "grpo"), torch.zeros(2, 4))


GROUP_ESTIMATORS = [name for name in get_args(policy.Estimator) if name != "reinforce"]


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("size", [2, 3, 5, 7, 8, 12])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(estimator, size, rng):
    equal = (-torch.rand(500, 1, generator=rng)).repeat(1, size)
    assert policy.group_advantages(equal, estimator).abs().max() == 0
    rounded = equal * (1 + 2e-7 * (torch.rand(equal.shape, generator=rng) - 0.5))  # 2 units in the last place
    assert not torch.equal(rounded, equal)
    assert policy.group_advantages(rounded, estimator).abs().max() == 0
    told_apart = equal - 1e-4 * torch.arange(size) / size
    assert policy.group_advantages(told_apart, estimator).abs().amax(1).min() > 0


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_a_tie_at_one_place_has_no_advantage_there(estimator, rng):
    """The rounding of a place where nothing is wrong is measured by the rewards of the whole image."""
    rewards = -torch.rand(3, 4, 5, generator=rng)
    rewards[:, :, 1] = -1e-9 * torch.rand(3, 4, generator=rng)
    found = policy.group_advantages(rewards, estimator)
    assert found[:, :, 1].abs().max() == 0 and found[:, :, [0, 2, 3, 4]].abs().amax(1).min() > 0
    spread, tied = policy.group_spread(rewards)
    assert tied.sum(0).tolist() == [0, 3, 0, 0, 0]
    torch.testing.assert_close(spread[:, 2], rewards[:, :, 2].std(1))
    assert spread[:, 1].max() == 0


def test_small_rewards_are_compared_like_large_ones():
    small = policy.group_advantages(1e-6 * REWARDS, "dr_grpo")
    torch.testing.assert_close(small, 1e-6 * policy.group_advantages(REWARDS, "dr_grpo"))
    for scale in (1e-9, 1e-30, 1e30):
        torch.testing.assert_close(
            policy.group_advantages(scale * REWARDS, "grpo"), policy.group_advantages(REWARDS, "grpo")
        )


def test_the_rounding_of_rewards_that_cancel_is_a_tie(rng):
    parts = torch.tensor([1000.0, -1000.0])[:, None, None] * (1 + 1e-7 * torch.rand(2, 3, 4, generator=rng))
    total, sizes = parts.sum(0), parts.abs().sum(0)
    assert policy.group_advantages(total, "grpo").abs().max() > 1
    assert policy.group_advantages(total, "grpo", sizes=sizes).abs().max() == 0
    assert policy.group_spread(total, sizes)[0].abs().max() == 0


def test_advantages_by_token_are_those_of_each_token(rng):
    rewards = torch.randn(3, 4, 5, generator=rng)
    found = policy.group_advantages(rewards, "grpo")
    torch.testing.assert_close(found[:, :, 2], policy.group_advantages(rewards[:, :, 2], "grpo"))


def test_the_gradient_of_a_two_token_bandit():
    """One image, one token, two codes with p = sigmoid(z); reward 1 for code 1 and 0 for code 0.

    d/dz E[R] = p (1 - p). On a group of one draw of each code, REINFORCE without baseline has the gradient of
    -(1 * log p) / 2, and Dr.GRPO, with advantages -1/2 and 1/2, that of -(log p - log(1 - p)) / 4, which is -1/4.
    """
    z = torch.tensor(0.3, requires_grad=True)
    logits = torch.stack([torch.zeros(()), z])[None, None]  # (1, 1, 2)
    actions = torch.tensor([[[0], [1]]])  # (1, G = 2, 1)
    rewards = torch.tensor([[0.0, 1.0]])
    p = torch.sigmoid(z).item()
    for estimator, expected in (("reinforce", -(1 - p) / 2), ("dr_grpo", -0.25), ("rloo", -0.5)):
        log_probs = policy.token_log_probs(logits, actions)
        advantages = policy.group_advantages(rewards, estimator, baseline=0.0)[..., None]
        ratio = policy.probability_ratio(log_probs, log_probs.detach())
        (gradient,) = torch.autograd.grad(policy.clipped_policy_loss(ratio, advantages, 0.2, 0.2).mean(), z)
        assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_the_expected_policy_gradient_is_that_of_the_expected_reward(rng):
    """Over many draws, the mean REINFORCE gradient approaches -d E[R] / d logits."""
    logits = torch.tensor([[[0.2, -0.4, 0.9]]], requires_grad=True)
    values = torch.tensor([1.0, -2.0, 0.5])
    expected = torch.autograd.grad((logits.softmax(-1) * values).sum(), logits)[0]
    uniforms = torch.rand(1, 200_000, 1, generator=rng, dtype=torch.float64)
    actions = losses.look(logits.detach(), uniforms=uniforms).drawn
    log_probs = policy.token_log_probs(logits, actions)
    advantages = policy.group_advantages(values[actions[..., 0]], "rloo", clamp=0)[..., None]
    ratio = policy.probability_ratio(log_probs, log_probs.detach())
    found = torch.autograd.grad(policy.clipped_policy_loss(ratio, advantages, 0.2, 0.2).mean(), logits)[0]
    torch.testing.assert_close(-found, expected, atol=5e-3, rtol=0)


def test_clipping_stops_the_gradient_on_the_side_of_the_advantage():
    for advantage, ratio, flows in [(1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, 1.5, True)]:
        x = torch.tensor(ratio, requires_grad=True)
        (gradient,) = torch.autograd.grad(policy.clipped_policy_loss(x, torch.tensor(advantage), 0.2, 0.2), x)
        assert (gradient != 0) == flows
    asymmetric = policy.clipped_policy_loss(torch.tensor(1.25), torch.tensor(1.0), 0.2, 0.28)
    assert float(asymmetric) == pytest.approx(-1.25)


def test_the_sequence_ratio_is_the_geometric_mean():
    new, old = torch.tensor([[[0.0, -1.0, -3.0]]]), torch.tensor([[[-1.0, -1.0, -1.0]]])
    ratio = policy.probability_ratio(new, old, whole_sequence=True)
    assert ratio.shape == (1, 1, 1)
    assert float(ratio) == pytest.approx(math.exp((1 + 0 - 2) / 3))
    assert torch.allclose(policy.probability_ratio(new, old), (new - old).exp())
    assert policy.clip_fraction(policy.probability_ratio(new, old), 0.2, 0.2) == pytest.approx(2 / 3)


def test_k3_estimates_the_exact_divergence(rng):
    logits, prior = torch.randn(1, 2, 6, generator=rng), torch.randn(1, 2, 6, generator=rng)
    exact = policy.kl_exact(logits, prior)
    p, q = logits.double().softmax(-1), prior.double().softmax(-1)
    torch.testing.assert_close(exact.double(), (p * (p / q).log()).sum(-1))
    uniforms = torch.rand(1, 200_000, 2, generator=rng, dtype=torch.float64)
    actions = losses.look(logits, uniforms=uniforms).drawn
    estimate = policy.kl_k3(policy.token_log_probs(logits, actions), policy.token_log_probs(prior, actions))
    assert (estimate >= 0).all()
    torch.testing.assert_close(estimate.mean(1), exact, rtol=0.03, atol=0)
    assert policy.kl_k3(torch.zeros(3), torch.zeros(3)).sum() == 0


def test_soft_targets_follow_the_distance_of_codes():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    targets = policy.code_similarity_targets(codebook, tau=2.0)
    weights = torch.tensor([1.0, math.exp(-1 / 2), math.exp(-9 / 2)])
    torch.testing.assert_close(targets[0], weights / weights.sum())
    sharp = policy.code_similarity_targets(codebook, tau=1e-3)
    torch.testing.assert_close(sharp, torch.eye(3))
    logits = torch.randn(2, 4, 3, generator=generator(0, "soft"))
    tokens = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    torch.testing.assert_close(
        losses.soft_cross_entropy(logits, sharp[tokens]), losses.next_token_loss(logits, tokens), rtol=1e-5, atol=1e-6
    )
