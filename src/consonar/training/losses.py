"""The formulas that are minimised. Pure functions: tensors in, tensors out; the caller weights and sums. All in
float32, whatever the update runs in; of logits in bf16 some rows at a time, so that no float32 copy of all stands.

Letters: `B` batch, `N` tokens, `V` codes, `C` code width, `K` tokens looked at in each place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from consonar.float32 import LOW, in_float32, raise_precision

NUMBERS_AT_ONCE = 2**24
"""Logits that are float32 at one time: 64 MB."""


class RowwiseLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature)[tokens]: (R, K) float32 <- logits (R, V), tokens (R, K).

    For the gradient, which is one tensor like the logits, no more is kept than these and R numbers.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        totals = [(raise_precision(rows) / temperature).logsumexp(-1) for rows in logits.split(rows_at_once(logits))]
        total = torch.cat(totals)[:, None]
        ctx.save_for_backward(logits, tokens, total)
        ctx.temperature = temperature
        return raise_precision(logits.gather(-1, tokens)) / temperature - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, total = ctx.saved_tensors
        gradient, result, count = gradient / ctx.temperature, torch.empty_like(logits), rows_at_once(logits)
        parts = zip(*(x.split(count) for x in (result, logits, tokens, total, gradient)), strict=True)
        for piece, rows, chosen, sums, wanted in parts:
            moved = (raise_precision(rows) / ctx.temperature).sub_(sums).exp_().mul_(-wanted.sum(-1, keepdim=True))
            piece.copy_(moved.scatter_add_(-1, chosen, wanted))
        return result, None, None


def rows_at_once(logits: Tensor) -> int:
    return max(1, NUMBERS_AT_ONCE // logits.shape[-1])


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi of the given tokens: (B, N, K) float32 <- logits (B, N, V), tokens (B, N, K)."""
    if logits.dtype not in LOW:
        return (logits / temperature).log_softmax(-1).gather(-1, tokens)
    found: Tensor = RowwiseLogProbs.apply(logits.flatten(0, 1), tokens.flatten(0, 1), temperature)
    return found.view(tokens.shape)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean of -log pi(x_i | x_<i, c): scalar <- logits (B, N, V), tokens (B, N)."""
    if logits.dtype not in LOW:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return -log_probs(logits, tokens[..., None]).mean()


@in_float32
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -sum_k target_k log pi_k: scalar <- logits (B, N, V), target distributions (B, N, V)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def next_token_accuracy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of positions whose most likely token is the true one, 0..1."""
    return (logits.argmax(-1) == tokens).float().mean()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution in nats: (B, N) float32 <- (B, N, V)."""
    rows = logits.flatten(0, 1)
    parts = rows.split(rows_at_once(logits)) if logits.dtype in LOW else [rows]
    known = (raise_precision(part).log_softmax(-1) for part in parts)
    return torch.cat([-(part.exp() * part).sum(-1) for part in known]).view(logits.shape[:-1])


@in_float32
def codebook_alignment_loss(predicted: Tensor, codes: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean of 1 - cos(predicted, codes): scalar <- two (B, N, C); reAR (arXiv 2510.04450), L_emb.

    `keep` (B, N) bool sets other positions' terms to 0, and the mean still divides by all positions: what the released
    code does with noised positions. Codes carry no gradient.
    """
    distance = 1 - F.cosine_similarity(predicted, codes.detach(), dim=-1)  # (B, N)
    if keep is not None:
        distance = torch.where(keep, distance, 0.0)
    return distance.mean()
