"""The formulas that are minimised. Pure functions: tensors in, tensors out; the caller weights and sums. All in
float32, whatever the update runs in; of logits in bf16 some rows at a time, so that no float32 copy of all stands.

Letters: `B` batch, `N` tokens, `V` codes, `C` code width, `K` tokens looked at in each place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from consonar.float32 import LOW, in_float32, raise_precision
from consonar.seeding import in_proportion

NUMBERS_AT_ONCE = 2**24
"""Logits that are float32 at one time: 64 MB."""


class Rowwise(torch.autograd.Function):
    """log softmax(logits / temperature)[tokens], (R, K) float32, and the entropy <- logits (R, V), tokens (R, K), and
    what is known: the logarithms of the sums, `total` (R, 1), and the `entropy` (R, 1), or None, which is returned.

    For the gradient, which is one tensor like the logits, no more is kept than these: d log p_a / dz_k = [a = k] - p_k
    and dH / dz_k = -p_k (log p_k + H), both over the temperature. What nothing depends on costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, total: Tensor, entropy: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, tokens, total, entropy)
        ctx.temperature = temperature
        found = tempered(logits.gather(-1, tokens), temperature) - total
        return found, None if entropy is None else entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_tokens: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, tokens, total, entropy = ctx.saved_tensors
        wanted = total.new_zeros(tokens.shape) if of_tokens is None else of_tokens
        result, columns = torch.empty_like(logits), [wanted / ctx.temperature]
        if of_entropy is not None:
            columns += [entropy, of_entropy / ctx.temperature]
        columns = [result, logits, tokens, total, *columns]
        for piece, rows, chosen, sums, wanted, *held in zip(
            *(some_rows(x, logits.shape[-1]) for x in columns), strict=True
        ):
            log_probs, scale = tempered(rows, ctx.temperature) - sums, -wanted.sum(-1, keepdim=True)
            if held:
                scale = scale - held[1] * (log_probs + held[0])
            piece.copy_(log_probs.exp_().mul_(scale).scatter_add_(-1, chosen, wanted))
        return result, None, None, None, None


def tempered(rows: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 or more; where that is 1 they may be the given ones."""
    raised: Tensor = raise_precision(rows)
    return raised if temperature == 1 else raised / temperature


def some_rows(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """The rows in parts, so many that logits of `size` codes beside them are at most `NUMBERS_AT_ONCE`."""
    return rows.split(max(1, NUMBERS_AT_ONCE // size))


@dataclass(frozen=True)
class Seen:
    """What one pass over logits (B, N, V) finds of softmax(logits / temperature)."""

    logits: Tensor
    temperature: float
    total: Tensor
    """(B * N, 1) float32: the logarithm of the sum, which log pi of any token follows from."""
    entropy: Tensor
    """(B, N) float32, nats."""
    drawn: Tensor
    """(B, K, N) int64: tokens drawn by the K numbers of each place."""

    def log_probs(self, tokens: Tensor) -> Tensor:
        """log pi of the given tokens, with a gradient: (B, K, N) float32 <- (B, K, N)."""
        return self.with_gradient(tokens)[0]

    def with_gradient(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log pi of the given tokens and the entropy, of one gradient: (B, K, N), (B, N) float32 <- (B, K, N)."""
        rows, chosen = self.logits.flatten(0, 1), tokens.transpose(1, 2)
        known = self.entropy.view(-1, 1)
        found, entropy = Rowwise.apply(rows, chosen.flatten(0, 1), self.total, known, self.temperature)
        return found.view(chosen.shape).transpose(1, 2), entropy.view(self.entropy.shape)


@torch.no_grad()
def look(logits: Tensor, temperature: float = 1.0, uniforms: Tensor | None = None) -> Seen:
    """The pass that losses, draws and entropy share; `uniforms` (B, K, N) in [0, 1) are what tokens are drawn by."""
    (count, length, size), numbers = logits.shape, logits.new_empty(0) if uniforms is None else uniforms
    numbers = numbers.view(count, -1, length).transpose(1, 2)  # (B, N, K)
    parts = logits.flatten(0, 1), numbers.flatten(0, 1)
    found = []
    for rows, of_rows in zip(*(some_rows(x, size) for x in parts), strict=True):
        scaled = raise_precision(rows) / temperature
        total, drawn = scaled.logsumexp(-1, keepdim=True), scaled.new_empty(len(rows), 0, dtype=torch.int64)
        if uniforms is not None:  # in float64, so that a draw does not depend on how the sum was rounded
            drawn = in_proportion(scaled.to(torch.float64, copy=True).sub_(total).exp_(), of_rows)
        log_probs = scaled.sub_(total)
        found.append((total, -log_probs.exp().mul_(log_probs).sum(-1), drawn))
    total, entropy, drawn = (torch.cat(column) for column in zip(*found, strict=True))
    drawn = drawn.view(numbers.shape).transpose(1, 2).contiguous()
    return Seen(logits, temperature, total, entropy.view(count, length), drawn)


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi of the given tokens: (B, N, K) float32 <- logits (B, N, V), tokens (B, N, K)."""
    rows = logits.flatten(0, 1)
    with torch.no_grad():
        parts = [tempered(part, temperature).logsumexp(-1, keepdim=True) for part in some_rows(rows, rows.shape[-1])]
    found: Tensor = Rowwise.apply(rows, tokens.flatten(0, 1), torch.cat(parts), None, temperature)[0]
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
    parts = some_rows(rows, rows.shape[-1]) if logits.dtype in LOW else [rows]
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
