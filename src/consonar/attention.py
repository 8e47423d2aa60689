"""Causal attention, the one of all generators, over keys and values that the caller owns.

Letters: `B` batch, `n` new positions, `T` positions read so far with them, `P` condition tokens, `H` heads, `E` width
of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KVCache:
    """Keys and values (L, 2, B, heads, T, head_dim) of the positions read so far; `length` says how many.

    The generator writes with `append` once per layer and calls `advance` once per forward pass. Allocating once instead
    of concatenating at every step avoids copying the whole prefix N times.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (num_layers, 2, batch_size, num_heads, max_length, head_dim)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, n, head_dim) behind what is there and returns everything up to and including it."""
        end = self.length + keys.shape[2]
        assert end <= self.max_length, f"cache of {self.max_length} positions asked to hold {end}"
        self.data[layer, 0, :, :, self.length : end] = keys
        self.data[layer, 1, :, :, self.length : end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, count: int) -> None:
        self.length += count


class CausalAttention(nn.Module):
    """Softmax(q k^T / sqrt(E)) v over the positions up to each query's own. Without weights; `consonar.cpu` replaces
    `unmasked` where a processor has a faster way."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, cache: KVCache | None, layer: int, dropout: float
    ) -> Tensor:
        """(B, n, H E) of q (B, H, n, E) over k, v (B, key heads, n, E) and what the cache holds of this layer.

        `mask`: see `attention_mask`. `dropout` on the attention weights, 0 in evaluation.
        """
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if k.shape[1] != q.shape[1]:  # grouped queries: neighbouring heads share keys
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if cache is None and mask is None:
            mixed = self.unmasked(q, k, v, dropout)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def unmasked(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Of whole sequences without padding: all (B, H, n, E)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def attention_mask(
    num_queries: int, num_keys: int, kept: Tensor | None, *, cached: bool, device: torch.device
) -> Tensor | None:
    """Which of T keys the last n positions may read, (n, T) or (B, 1, n, T) bool; None: `CausalAttention` knows.

    `kept` (B, P or T) is False at padding of the condition: nothing reads it but the padded position itself (a row that
    may read nothing has no softmax).
    """
    if kept is None:
        if not cached or num_queries == 1:  # the last position reads everything
            return None
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    places = torch.arange(num_keys, device=device)
    queries = places[num_keys - num_queries :, None]
    visible = F.pad(kept, (0, num_keys - kept.shape[1]), value=True)[:, None]  # (B, 1, T)
    return ((places <= queries) & visible | (places == queries))[:, None]
