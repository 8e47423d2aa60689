"""Entropy held while a reward is maximised, on a bandit whose best policy is known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from consonar.distributed import World
from consonar.seeding import generator
from consonar.training import losses
from consonar.training import policy_gradient as policy
from consonar.training.objectives.policy import Drawn, PolicyConfig, TeacherForcedPolicy

START = torch.tensor([[0.3, -0.4, 0.9, 0.1, -1.0, 0.2], [-0.5, 0.4, 0.3, 3.0, -1.0, 0.1]])  # (N, V): one place is sure
REWARDS = torch.tensor([[0.0, 0.9, 0.3, 0.6, -0.5, 0.2], [0.8, 0.2, -0.4, 0.0, 0.5, 0.1]])
WEIGHT = 4.0


class Table(nn.Module):
    """A generator whose logits are its weights, whatever the context."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(START.clone())

    def forward(self, context: Tensor, condition: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        return self.logits[None], {}


def entropies(logits: Tensor) -> Tensor:
    return losses.entropy(logits[None])[0]


def trained(tokenizer, **settings) -> Tensor:
    """Logits after the policy gradient of `settings`, credit by place, draws spread evenly over the distribution."""
    config = PolicyConfig(rewards={"mse": 1.0}, estimator="rloo", advantage_clamp=0.0, ce_weight=0.0, **settings)
    settings = {"total_steps": 1, "seed": 0, "world": World(0, 1, torch.device("cpu"))}
    objective, model = TeacherForcedPolicy(config, tokenizer, Table(), **settings), Table()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.12)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 350)
    context, group, rng = torch.zeros(1, 2, dtype=torch.int64), 256, generator(0, "bandit")
    for _ in range(350):
        uniforms = (torch.arange(group)[:, None] + torch.rand(1, 2, dtype=torch.float64, generator=rng)) / group
        seen = losses.look(model(context, context)[0], uniforms=uniforms[None])
        rewards = REWARDS.T.gather(0, seen.drawn[0])[None]  # (1, G, N)
        advantages = policy.group_advantages(rewards, "rloo", clamp=0.0)
        loss, _ = objective.policy_loss(seen, Drawn(seen.drawn, advantages, {}), context, context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.logits.detach()


def best(weight: float, kl_weight: float, of_mean: bool) -> Tensor:
    """Of the penalised reward: p proportional to q^(beta / (beta + b)) exp(r / (beta + b)), b = 2 c (H_start - H).

    b is where both sides agree, where the left one grows with b and the right one falls; it may be below 0 where the
    divergence alone would leave more entropy than there was.
    """

    def tilted(b: Tensor) -> Tensor:
        scale = (kl_weight + b)[:, None]
        return kl_weight / scale * START.log_softmax(-1) + REWARDS / scale

    low, high = torch.full((2,), 1e-3 - kl_weight), torch.full((2,), 50.0)
    for _ in range(60):
        b = (low + high) / 2
        short = entropies(START) - entropies(tilted(b))
        enough = b > 2 * weight * (short.mean() if of_mean else short)
        low, high = torch.where(enough, low, b), torch.where(enough, b, high)
    return tilted(b)


@pytest.mark.parametrize(("of_mean", "kl_weight"), [(False, 0.0), (False, 0.2), (True, 0.0)])
def test_training_reaches_the_most_reward_at_its_entropy(of_mean, kl_weight, tokenizer):
    held = {"entropy": "mean" if of_mean else "position", "entropy_weight": WEIGHT}
    found = trained(tokenizer, **held, kl_weight=kl_weight, kl="exact" if kl_weight else "k3")
    expected = best(WEIGHT, kl_weight, of_mean)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=0.01, rtol=0)
    reward = [float((logits.softmax(-1) * REWARDS).sum()) for logits in (START, found)]
    assert reward[1] > reward[0] + 0.2
    moved = entropies(found) - entropies(START)
    if of_mean:  # the sure place pays for what the other loses
        assert moved[0] < -0.2 and moved[1] > 0.2 and abs(float(moved.mean())) < 0.1
    else:
        assert moved.abs().max() < 0.1
        assert torch.equal(found[1].argmax(), REWARDS[1].argmax()) and START[1].argmax() == 3


def test_without_it_the_same_policy_loses_its_entropy(tokenizer):
    assert entropies(trained(tokenizer)).max() < 0.5 * entropies(START).min()


def test_the_penalty_is_of_every_position_or_of_the_mean_of_an_image():
    entropy, start = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [1.0, 1.5]])
    assert policy.entropy_penalty(entropy, start) == pytest.approx((1 + 1 + 1 + 0.25) / 4)
    assert policy.entropy_penalty(entropy, start, of_mean=True) == pytest.approx((0 + 0.75**2) / 2)
    assert math.isclose(float(policy.entropy_penalty(start, start)), 0)
