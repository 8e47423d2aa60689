"""Classifier-free guidance: how logits are combined, and how strongly at each position. Pure functions."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

GuidanceSchedule = Literal["constant", "linear", "power_cosine", "power_cosine_vapi", "interval"]


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale (conditional - unconditional); scale 1 is the conditional model (Ho & Salimans 2022)."""
    if scale == 1:  # exactly, where the sum would be off by rounding
        return conditional
    return unconditional + scale * (conditional - unconditional)


def power_cosine_scale(scale: float, power: float, position: int, num_tokens: int) -> float:
    """1 + (scale - 1) (1 - cos(pi (i / N)^power)) / 2 (MDT, used by RAR and reAR): 1 at the first token, `scale` only
    at i = N, which no token has."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (position / num_tokens) ** power)) / 2


def scale_at(
    schedule: GuidanceSchedule,
    scale: float,
    position: int,
    num_tokens: int,
    *,
    power: float = 1.0,
    interval_end: int | None = None,
) -> float:
    """Guidance scale for the token at `position` (0-based) of `num_tokens`.

    constant: `scale`. linear: from 1 at the first token to `scale` at the last. power_cosine: see above.
    power_cosine_vapi: `scale` at the first token, then power_cosine over the others, so 1 at the second: VA-pi's
    sampler does not count the token that the prefill predicts. interval: `scale` up to and including position
    `interval_end` (None: always), 1 after it; LlamaGen's cfg_interval k, which does not count that token either, is
    `interval_end` k + 1, and its -1 is None.
    """
    if schedule == "constant":
        return scale
    if schedule == "linear":
        return 1 + (scale - 1) * position / max(1, num_tokens - 1)
    if schedule == "power_cosine":
        return power_cosine_scale(scale, power, position, num_tokens)
    if schedule == "power_cosine_vapi":
        return scale if position == 0 else power_cosine_scale(scale, power, position - 1, num_tokens - 1)
    assert schedule == "interval", schedule
    return scale if interval_end is None or position <= interval_end else 1.0
