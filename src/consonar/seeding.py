"""Named random generators derived from one seed.

A generator is a function of (seed, names), for example (0, "noise", step): there is no generator state to save, and a
resumed run draws exactly what the uninterrupted one would have drawn.
"""

import hashlib
from collections.abc import Callable

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every argument; the same on every machine."""
    digest = hashlib.sha256("/".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` for one purpose, e.g. `generator(seed, "noise", step)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def rows_of_rank(draw: Callable[[int], torch.Tensor], num_rows: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows of a draw for the batch of all ranks: every `world_size`-th from its own number on.

    So are the items dealt (`consonar.data.loader.batch_rows`): what is drawn for an item does not depend on the number
    of processes. `draw(n)` makes n rows; every rank must draw from the same state.
    """
    return draw(num_rows * world_size)[rank::world_size]
