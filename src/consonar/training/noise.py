"""Noisy context (reAR, arXiv 2510.04450): its settings, schedules of the largest rate; how tokens are replaced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from consonar.distributed import ALONE, World
from consonar.float32 import in_float32
from consonar.options import Count, Options, Range, ReadOnlyWith, Share
from consonar.records import to_device
from consonar.seeding import integers, uniform

Schedule = Literal["none", "constant", "uniform", "linear", "truncated_linear"]
Corruption = Literal["uniform", "mask", "nearest"]
NOISE = ReadOnlyWith(lambda given: given.schedule != "none", "{}schedule other than 'none'")
REPLACED = ReadOnlyWith(lambda given: given.replaces, "{}schedule other than 'none' and {}max_rate over 0")
ANNEALING = ReadOnlyWith(
    lambda given: given.replaces and given.schedule == "truncated_linear",
    "{}schedule 'truncated_linear' and {}max_rate over 0",
)
NEAREST = ReadOnlyWith(
    lambda given: given.replaces and given.corruption == "nearest",
    "{}corruption 'nearest', {}schedule other than 'none' and {}max_rate over 0",
)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Options):
    """Noisy context: how often and by what context tokens are replaced."""

    section = "objective.noise"

    schedule: Schedule = "none"
    """How the largest rate f(t) moves over training; the article's best is truncated_linear."""
    max_rate: Annotated[Share, NOISE] = 1.0
    """Largest rate at the start (linear, truncated_linear), always (uniform), or the rate itself (constant)."""
    anneal_end: Annotated[float, Range(0, 1, "(]"), ANNEALING] = 0.75
    """Share of training after which truncated_linear is 0."""
    corruption: Annotated[Corruption, REPLACED] = "uniform"
    """What replaces a token: any code, the mask, or one of its nearest codes."""
    num_neighbours: Annotated[Count, NEAREST] = 16
    """How many nearest codes `nearest` chooses from."""

    @property
    def replaces(self) -> bool:
        """Whether any token is replaced at some step."""
        return self.schedule != "none" and self.max_rate > 0


def max_noise_rate(schedule: Schedule, progress: float, *, max_rate: float = 1.0, anneal_end: float = 0.75) -> float:
    """f(t), the upper end of the per-sequence rate at `progress` t = step / total steps in [0, 1].

    none 0; constant and uniform `max_rate`; linear `max_rate` (1 - t); truncated_linear `max_rate` max(0, 1 - t /
    `anneal_end`), which is the published one.
    """
    left = {"none": 0, "linear": 1 - progress, "truncated_linear": max(0, 1 - progress / anneal_end)}.get(schedule, 1)
    return max_rate * left


def draw_noise_rates(schedule: Schedule, max_rate: float, batch_size: int, rng: torch.Generator) -> Tensor:
    """eps of each sequence, (B,): U[0, max_rate], or `max_rate` itself under the constant schedule."""
    rates = uniform(rng, batch_size) * max_rate
    return torch.full_like(rates, max_rate) if schedule == "constant" else rates


def corrupt_tokens(
    tokens: Tensor,
    rates: Tensor,
    vocab_size: int,
    rng: torch.Generator,
    world: World = ALONE,
    *,
    mask_token: int | None = None,
    neighbours: Tensor | None = None,
    replacement: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces each token with probability rates[b]: context (B, N) and where it was replaced (B, N) bool.

    By that in `replacement` (B, N); by `mask_token`; or by one of the codes listed in `neighbours` (V, n) for it, all
    equally likely; or, without these, by any code, the same one included. Draws from `rng` only; `rng.device` is where
    the draws happen.
    """

    def own(draw: Callable[[int], Tensor]) -> Tensor:
        return to_device(world.own_rows(draw, len(tokens)), tokens.device)

    length = tokens.shape[1]
    corrupted = own(lambda rows: uniform(rng, rows, length)) < to_device(rates, tokens.device)[:, None]
    if mask_token is not None:
        replacement = torch.full_like(tokens, mask_token)
    elif replacement is None and neighbours is not None:
        count = neighbours.shape[1]
        replacement = neighbours[tokens, own(lambda rows: integers(rng, 0, count, rows, length))]
    elif replacement is None:
        replacement = own(lambda rows: integers(rng, 0, vocab_size, rows, length))
    return torch.where(corrupted, replacement, tokens), corrupted


@in_float32
def code_neighbours(codebook: Tensor, count: int) -> Tensor:
    """The `count` nearest other codes of each code by Euclidean distance, nearest first: (V, count) <- (V, C)."""
    distances = torch.cdist(codebook, codebook)
    distances.fill_diagonal_(torch.inf)
    return distances.topk(count, largest=False).indices
