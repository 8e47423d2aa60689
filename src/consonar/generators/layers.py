"""Layers that the generators of LlamaGen (arXiv 2406.06525) and AliTok (arXiv 2506.05289) share: RMSNorm, SwiGLU,
rotary positions (RoFormer, arXiv 2104.09864) on a line or a grid.

Facts kept from the released code: rotary pairs are neighbours (2i, 2i + 1); on a grid the first half of the pairs turns
with the row, the second half with the column; the rows of the table that belong to the condition are zero, not the
identity, so queries and keys of condition tokens vanish and every image token gives all of them the score 0; rotation
and RMSNorm run in float32, the norm's weight is applied after the cast back.

Letters: `n` new positions, `P` condition tokens, `N` image tokens, `E` width of one head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.types import Grid


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def swiglu_width(width: int, multiple_of: int) -> int:
    """8/3 of `width`, so that three matrices cost what two of 4 `width` do, rounded up to a multiple."""
    return -(8 * width // 3 // -multiple_of) * multiple_of


def rotary_angles(positions: Tensor, num_pairs: int, base: float) -> Tensor:
    """positions * base^(-i / num_pairs) for pair i: (n, num_pairs) float32 <- (n,)."""
    exponents = torch.arange(num_pairs, dtype=torch.float32) / num_pairs
    return positions.float()[:, None] * (1.0 / base**exponents)


@lru_cache(maxsize=64)
def rotary_table(
    head_dim: int, num_condition_tokens: int, num_tokens: int, grid: Grid | None, base: float, device: torch.device
) -> Tensor:
    """(P + N, head_dim / 2, 2) float32, cosine and sine of every position's angles; zeros for the condition.

    Tokens without a place (all of them where `grid` is None, else its prefix) have positions 0, 1, ... on a line; rows
    and columns of a grid are counted on from there, as in AliTok (without a prefix: from 0, as in LlamaGen).
    """
    # A table made while sampling serves training too, where autograd refuses tensors of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        num_on_line = num_tokens if grid is None else grid.prefix
        angles = rotary_angles(torch.arange(num_on_line), head_dim // 2, base)
        if grid is not None:
            rows = rotary_angles(grid.prefix + torch.arange(grid.rows), head_dim // 4, base)
            columns = rotary_angles(grid.prefix + torch.arange(grid.columns), head_dim // 4, base)
            places = [rows.repeat_interleave(grid.columns, 0), columns.repeat(grid.rows, 1)]
            angles = torch.cat([angles, torch.cat(places, -1)])  # (N, head_dim / 2)
        table = torch.stack([angles.cos(), angles.sin()], -1)
        return torch.cat([table.new_zeros(num_condition_tokens, *table.shape[1:]), table]).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the neighbouring pairs of x (..., n, E) by the table (n, E / 2, 2); in float32, returned as it came."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2).to(x.dtype)
