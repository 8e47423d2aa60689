"""Named random generators derived from one seed.

A generator is a function of (seed, names), for example (0, "noise", step): there is no generator state to save, and a
resumed run draws exactly what the uninterrupted one would have drawn.
"""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every argument; the same on every machine."""
    digest = hashlib.sha256("/".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` for one purpose, e.g. `generator(seed, "noise", step)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))
