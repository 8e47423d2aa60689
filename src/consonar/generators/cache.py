"""The key-value cache: allocated once, owned by the caller, passed as an argument."""

from __future__ import annotations

import torch
from torch import Tensor


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
        self.length = 0

    @property
    def batch_size(self) -> int:
        return self.data.shape[2]

    @property
    def max_length(self) -> int:
        return self.data.shape[4]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, n, head_dim) behind what is there and returns everything up to and including it."""
        end = self.length + keys.shape[2]
        assert end <= self.max_length, f"cache of {self.max_length} positions asked to hold {end}"
        self.data[layer, 0, :, :, self.length : end] = keys
        self.data[layer, 1, :, :, self.length : end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, count: int) -> None:
        self.length += count
