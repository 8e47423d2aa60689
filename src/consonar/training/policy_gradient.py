"""Group-relative policy gradient on tokens drawn under teacher forcing (VA-pi, arXiv 2512.19680). Pure functions.

All `G` samples of an image are drawn from the same logits, in one pass over them (`losses.look`): the generator runs
once per image, whatever G is. Estimators, with the source of each:
- `grpo` (arXiv 2402.03300): reward minus group mean, over the group's unbiased standard deviation.
- `dr_grpo` (arXiv 2503.20783): reward minus group mean.
- `rloo` (arXiv 2402.14740): reward minus the mean of the other samples.
- `gspo` (arXiv 2507.18071): advantages of `grpo`, one probability ratio per sequence.
- `dapo` (arXiv 2503.14476): advantages of `grpo`, a clip range that is wider upwards. Its token-level mean equals the
  others' here, since all sequences are of one length; its dropping of groups without spread has no use for a
  continuous reward and is left out.
- `reinforce` (Williams 1992): reward minus a running mean.

Letters: `B` images, `G` samples of each, `N` tokens, `V` codes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consonar.float32 import in_float32
from consonar.training import losses

Estimator = Literal["grpo", "dr_grpo", "rloo", "gspo", "dapo", "reinforce"]
TIE = 1e-6
"""Rewards of one image that differ by less than this share of its largest are equal: float32 leaves 6e-8 of each number
that is summed, and a standard deviation of such differences would make advantages of any size from them."""


def token_log_probs(logits: Tensor, actions: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi of each drawn token: (B, G, N) <- logits (B, N, V), actions (B, G, N). In float32."""
    return losses.log_probs(logits, actions.transpose(1, 2), temperature).transpose(1, 2)


@in_float32
def group_spread(rewards: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Standard deviation within each group, and whether it has none: two (B,) or (B, N) <- rewards (B, G[, N]).

    Differences below `TIE` times the largest reward of the image, over all its samples and tokens, are none; the
    standard deviation then is 0. A group of one has none. `sizes`, of the shape of the rewards, is what counts in the
    place of the rewards where these are sums of which much may cancel: the sum of the magnitudes.
    """
    scale = (rewards if sizes is None else sizes).abs().flatten(1).amax(1).view(-1, *[1] * (rewards.ndim - 2))
    tied = rewards.amax(1) - rewards.amin(1) <= TIE * scale
    if rewards.shape[1] == 1:
        return torch.zeros_like(tied, dtype=rewards.dtype), tied
    unit = scale.where(scale > 0, 1)  # the squares of very small rewards would be 0
    return ((rewards / unit.unsqueeze(1)).std(1) * unit).masked_fill(tied, 0), tied


@in_float32
def group_advantages(
    rewards: Tensor,
    estimator: Estimator,
    *,
    baseline: Tensor | float | None = None,
    clamp: float = 5.0,
    sizes: Tensor | None = None,
) -> Tensor:
    """Advantages of the same shape as rewards (B, G) or, with one reward per token, (B, G, N).

    `baseline` is what `reinforce` subtracts, broadcast; `clamp` bounds the advantages on both sides, 0 does not. Where
    samples are compared with each other, that is everywhere but in `reinforce`, a group without spread (`group_spread`,
    also for `sizes`) has advantages of exactly 0. There the standard deviation is divided by as it is, since it is over
    0: the released code adds 1e-8, which takes the advantages from rewards of that size.
    """
    if estimator == "reinforce":
        assert baseline is not None  # only `reinforce` takes one, and it always does
        advantages = rewards - baseline
    else:
        group_size = rewards.shape[1]
        assert group_size > 1, "a group of one has no spread"
        spread, tied = (value.unsqueeze(1) for value in group_spread(rewards, sizes))
        advantages = (rewards - rewards.mean(1, keepdim=True)).masked_fill(tied, 0)
        if estimator == "rloo":
            advantages = advantages * (group_size / (group_size - 1))
        elif estimator != "dr_grpo":
            assert estimator in ("grpo", "gspo", "dapo"), estimator
            advantages = advantages / spread.masked_fill(tied, 1)
    return advantages.clamp(-clamp, clamp) if clamp else advantages


@in_float32
def probability_ratio(log_probs: Tensor, old_log_probs: Tensor, *, whole_sequence: bool = False) -> Tensor:
    """rho = pi / pi_old of each token (B, G, N), or its geometric mean over the sequence (B, G, 1) (GSPO, eq. 7)."""
    difference = log_probs - old_log_probs
    return (difference.mean(-1, keepdim=True) if whole_sequence else difference).exp()


@in_float32
def clipped_policy_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) per token (PPO, eq. 7); ratio and advantages broadcast."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def clip_fraction(ratio: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Share of ratios outside the clip range, 0..1."""
    return ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).float().mean()


@in_float32
def kl_k3(log_probs: Tensor, prior_log_probs: Tensor) -> Tensor:
    """exp(d) - d - 1, d = log pi_prior - log pi at the drawn token: an estimate of KL(pi || prior), never negative."""
    difference = prior_log_probs - log_probs
    return difference.exp() - difference - 1


def kl_exact(logits: Tensor, prior_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(pi || prior) over the vocabulary, in nats: (B, N) float32 <- two (B, N, V).

    Some rows at a time, whose float32 numbers are made again for the gradient.
    """

    @in_float32
    def of_rows(logits: Tensor, prior_logits: Tensor) -> Tensor:
        log_probs, prior = ((rows / temperature).log_softmax(-1) for rows in (logits, prior_logits))
        return (log_probs.exp() * (log_probs - prior)).sum(-1)

    both = (losses.some_rows(rows.flatten(0, 1), rows.shape[-1]) for rows in (logits, prior_logits))
    parts = [
        checkpoint(of_rows, *rows, use_reentrant=False, preserve_rng_state=False) for rows in zip(*both, strict=True)
    ]
    return torch.cat(parts).view(logits.shape[:2])


@in_float32
def entropy_penalty(entropy: Tensor, start: Tensor, *, of_mean: bool = False) -> Tensor:
    """Mean of (H - H_start)^2 over all positions, or over the images of that of their mean: scalar <- two (B, N), nats.

    Either way it does not depend on how a batch is cut. Where nothing else acts, a policy of expected reward r with c
    times this ends at p proportional to exp(r / b), b = 2 c (H_start - H): the most reward that is to be had at its
    entropy, which is short of the start's by b / (2 c), with a b for every position or, `of_mean`, one for an image.
    With beta KL(p || q) it ends at q^(beta / (beta + b)) exp(r / (beta + b)).
    """
    deviation = entropy - start
    return (deviation.mean(1) if of_mean else deviation).square().mean()


def code_similarity_targets(codebook: Tensor, tau: float) -> Tensor:
    """softmax over k of -|Z[k] - Z[x]|^2 / tau, a row for each true token x: (V, V) <- codebook Z (V, C).

    What the pixel reward would teach if the decoder were linear and local.
    """
    distances = torch.cdist(codebook.double(), codebook.double()).square()
    return (-distances / tau).softmax(-1).float()
