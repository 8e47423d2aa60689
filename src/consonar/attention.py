"""Causal attention, the one of all generators, over keys and values that the caller owns.

Letters: `B` batch, `n` new positions, `T` positions read so far with them, `P` condition tokens, `H` heads, `E` width
of one head, `D` width of the model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class KVCache:
    """Keys and values of the positions read so far.

    The generator writes with `update` once per layer and calls `advance` once per forward pass. Allocating once instead
    of concatenating at every step avoids copying the whole prefix N times.

    How many were read is either known to the CPU (`read`), or to the device alone (`place`): then a token is read by
    the same operations on the same memory wherever it stands, which is what a captured graph replays.
    """

    data: Tensor
    """(layers, 2, B, key heads, most positions, E)."""
    read: int = 0
    """How many positions were read before `place` was set."""
    place: Tensor | None = None
    """(1,) int64 on the device: the position of the one token that is read next."""
    reach: int = 0
    """How many positions are attended to where `place` is set; those behind it are masked."""
    tables: Sequence[Tensor] = ()
    """What a generator reads at every position and has made ahead, kept here as long as a graph may read it."""
    first: int = -1
    """The position of the first row of `tables`, where they have only some positions."""

    @property
    def length(self) -> int:
        """How many positions were read. An error in a graph, which would hold the number of its first token."""
        assert self.place is None, "cache.length is asked for where the device alone knows it: see `KVCache.places`"
        return self.read

    def restart(self) -> None:
        """Nothing is read; the memory stays."""
        self.read, self.place, self.first = 0, None, -1

    def keep(self, tables: Iterable[Tensor]) -> None:
        """Makes these the `tables`, in the memory of those before, which had as many rows or more."""
        if not self.tables:
            self.tables = list(tables)
            return
        for kept, new in zip(self.tables, tables, strict=True):
            kept[: len(new)] = new

    def places(self, count: int) -> slice | Tensor:
        """Where the next `count` positions stand in a table of all."""
        if self.place is not None:
            return self.place
        end, most = self.read + count, self.data.shape[4]
        assert end <= most, f"cache of {most} positions asked to hold {end}"
        return slice(self.read, end)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, n, E) behind what is there and returns everything up to and including it."""
        if self.place is not None:
            for kept, new in zip(self.data[layer], (keys, values), strict=True):
                kept.index_copy_(2, self.place, new.to(kept.dtype))
            return self.data[layer, 0, :, :, : self.reach], self.data[layer, 1, :, :, : self.reach]
        end = self.read + keys.shape[2]
        self.data[layer, 0, :, :, self.read : end] = keys
        self.data[layer, 1, :, :, self.read : end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, count: int) -> None:
        if self.place is not None:
            self.place += count
        else:
            self.read += count


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
            k, v = cache.update(k, v, layer)
        shape, num_key_heads, queries = q.shape, k.shape[1], [q]
        # Neighbouring heads that share keys read them as they are. Not by `enable_gqa`: where CUDA has no fused kernel
        # for it, in float32 and under masks, PyTorch copies the keys and makes all scores.
        if num_key_heads != shape[1] and cache is not None and shape[2] == 1:
            queries = [q.reshape(len(q), num_key_heads, -1, shape[-1])]  # of one head
        elif num_key_heads != shape[1]:
            queries = list(q.unflatten(1, (num_key_heads, -1)).unbind(2))  # in turn
        mixed = [
            self.unmasked(some, k, v, dropout)
            if cache is None and mask is None
            else F.scaled_dot_product_attention(some, k, v, attn_mask=mask, dropout_p=dropout)
            for some in queries
        ]
        if len(mixed) > 1:
            return torch.stack([some.transpose(1, 2) for some in mixed], 3).flatten(2)
        # CUDA's kernels give positions outside heads, in which grouped heads cannot be viewed apart.
        return mixed[0].reshape(shape).transpose(1, 2).flatten(2)

    def unmasked(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Of whole sequences without padding: all (B, H, n, E)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the neighbouring pairs of x (..., n, E) by the table (n, E / 2, 2); in float32, returned as it came."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2).to(x.dtype)


class NormedAttention(nn.Module):
    """Causal self-attention of RAR, reAR and AliTok: queries and keys are normalised per head, by `norm(E)`."""

    def __init__(self, width: int, num_heads: int, dropout: float, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = norm(width // num_heads), norm(width // num_heads)
        self.proj = nn.Linear(width, width)
        self.attend = CausalAttention()

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int, table: Tensor | None = None
    ) -> Tensor:
        """(B, n, D) <- (B, n, D); with a `table`, queries and keys are turned by it (`rotate`) when normalised."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, E)
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        # Sequences that are drawn while the model trains (AR-GRPO) meet no dropout here.
        dropout = self.dropout if self.training and cache is None else 0.0
        mixed = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask=mask, cache=cache, layer=layer, dropout=dropout)
        return self.proj(mixed)


def attention_mask(num_queries: int, kept: Tensor | None, cache: KVCache | None, device: torch.device) -> Tensor | None:
    """Which of T keys the last n positions may read, (n, T) or (B, 1, n, T) bool; None: `CausalAttention` knows.

    `kept` (B, P or T) is False at padding of the condition: nothing reads it but the padded position itself (a row that
    may read nothing has no softmax). Where the device alone knows the position, 0 and -inf in the type of the cache:
    what is added to the scores of that token, (1, reach) or (B, 1, 1, reach).
    """
    if cache is not None and cache.place is not None:
        # Numbers, not bool: made once for all layers. Rows of the memory are of a multiple of 8, which kernels ask for.
        places = torch.arange(-(cache.reach // -8) * 8, device=device)
        visible = (places <= cache.place)[None]
        if kept is not None:
            visible = visible & F.pad(kept, (0, len(places) - kept.shape[1]), value=True)[:, None, None]
        return torch.zeros_like(visible, dtype=cache.data.dtype).masked_fill_(~visible, -torch.inf)[..., : cache.reach]
    num_keys = num_queries + (cache.read if cache is not None else 0)
    if kept is None:
        if cache is None or num_queries == 1:  # the last position reads everything
            return None
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    places = torch.arange(num_keys, device=device)
    queries = places[num_keys - num_queries :, None]
    visible = F.pad(kept, (0, num_keys - kept.shape[1]), value=True)[:, None]  # (B, 1, T)
    return ((places <= queries) & visible | (places == queries))[:, None]
