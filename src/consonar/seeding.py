"""Named random generators derived from one seed.

A generator is a function of (seed, names), for example (0, "noise", step): there is no generator state to save, and a
resumed run draws exactly what the uninterrupted one would have drawn.

All numbers that a generator gives are drawn here, on the generator's own device; `records.to_device` takes them to
another. Drawn on the CPU (the default) they are the same whatever the run computes on.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from consonar.errors import UserError
from consonar.options import is_whole


def check_seed(seed: int, key: str, count: int = 0) -> None:
    """Raises `UserError` unless `seed`, and those of the `count` images after it, are numbers from 0 to 2^63 - 1."""
    if not (is_whole(seed) and 0 <= seed <= 2**63 - 1 - count):
        raise UserError(f"{key}: {seed!r} is not between 0 and 2^63 - 1{' less the number of images' if count else ''}")


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every argument; the same on every machine."""
    digest = hashlib.sha256("/".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` for one purpose, e.g. `generator(seed, "noise", step)`."""
    return generator_of(derive_seed(seed, *names), device)


def generator_of(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """One of a seed that was derived before: `derive_seed` plus a place in the batch."""
    return torch.Generator(device=device).manual_seed(seed)


def uniform(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(shape, generator=rng, device=rng.device, dtype=dtype)


def exponential(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard exponential numbers, float32; minus their logarithm is standard Gumbel."""
    return torch.empty(shape, device=rng.device).exponential_(generator=rng)


def integers(rng: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    """int64 from `low` to `high` - 1."""
    return torch.randint(low, high, shape, generator=rng, device=rng.device)


def permutation(rng: torch.Generator, count: int) -> torch.Tensor:
    """0 .. `count` - 1 in a random order, int64."""
    return torch.randperm(count, generator=rng, device=rng.device)


def spread(rng: torch.Generator, wanted: int, count: int) -> torch.Tensor:
    """At most `wanted` of 0 .. `count` - 1, rising, int64: one from each of as many equal stretches, so that a set that
    is sorted by class is covered evenly, and one whose classes take turns is not seen at one of them alone."""
    wanted = min(wanted, count)
    edges = torch.arange(wanted + 1) * count // wanted
    return edges[:-1] + (uniform(rng, wanted, dtype=torch.float64) * edges.diff()).long()


@torch.no_grad()
def draw_weights(
    model: nn.Module, draw: Callable[..., object] = nn.init.trunc_normal_, rng: torch.Generator | None = None
) -> None:
    """By `draw`, of std 0.02, the weights of linear layers, convolutions and embeddings; their biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            draw(module.weight, std=0.02, generator=rng)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def choose(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws by inverse transform: (B, G) int64 <- logits (B, V), uniforms (B, G) in [0, 1)."""
    return in_proportion(logits.double().softmax(-1), uniforms)


def in_proportion(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws by inverse transform: (B, G) int64 <- weights (B, V), of any sum, uniforms (B, G) in [0, 1)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # with a large V the sum stays exact
    # `right`: a draw of exactly 0 must not fall on a token of probability 0.
    thresholds = (uniforms.double() * cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, thresholds, right=True).clamp_max_(weights.shape[-1] - 1)


def rows_of_rank(draw: Callable[[int], torch.Tensor], num_rows: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows of a draw for the batch of all ranks: every `world_size`-th from its own number on.

    So are the items dealt (`consonar.data.loader.batch_rows`): what is drawn for an item does not depend on the number
    of processes. `draw(n)` makes n rows; every rank must draw from the same state.
    """
    return draw(num_rows * world_size)[rank::world_size]
