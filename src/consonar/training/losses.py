"""The formulas that are minimised. Pure functions: tensors in, tensors out; the caller weights and sums. All in
float32, whatever the update runs in.

Letters: `B` batch, `N` tokens, `V` codes, `C` code width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from consonar.float32 import in_float32


@in_float32
def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean of -log pi(x_i | x_<i, c): scalar <- logits (B, N, V), tokens (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@in_float32
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -sum_k target_k log pi_k: scalar <- logits (B, N, V), target distributions (B, N, V)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def next_token_accuracy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of positions whose most likely token is the true one, 0..1."""
    return (logits.argmax(-1) == tokens).float().mean()


@in_float32
def entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution in nats: (B, N) <- (B, N, V)."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


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
