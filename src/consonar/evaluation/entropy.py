"""Teacher-forced entropy, and the temperature at which one model is as sharp as another.

Policy gradient lowers entropy, and so does sampling at a lower temperature; a gain that the start model shows as well
at the temperature of equal entropy is no gain of the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.training import losses
from consonar.types import Batch, Generator, Tokenizer

GRID = tuple(round(0.2 + 0.02 * i, 2) for i in range(91))
"""Temperatures at which entropy is measured to be inverted: 0.2 to 2."""


@torch.inference_mode()
def teacher_forced_entropies(
    generator: Generator, tokenizer: Tokenizer, batches: Iterator[Batch], temperatures: Sequence[float]
) -> list[float]:
    """Mean entropy in nats of the next-token distributions under the true context, at each temperature (over 0).

    `batches` hold images and conditions on the generator's device; one pass serves all temperatures.
    """
    sums, count = torch.zeros(len(temperatures), dtype=torch.float64), 0
    for batch in batches:
        assert batch.images is not None
        logits, _ = generator(tokenizer.encode(batch.images), batch.condition)
        for index, temperature in enumerate(temperatures):
            sums[index] += losses.entropy(logits.float() / temperature).mean().double().cpu() * len(logits)
        count += len(logits)
    return (sums / count).tolist()


def matching_temperature(entropies: Sequence[float], target: float, temperatures: Sequence[float] = GRID) -> float:
    """The temperature at which the entropy is `target`, between the measured ones by linear interpolation.

    Entropy grows with temperature. Raises `UserError` when `target` lies outside of what was measured.
    """
    values, points = torch.tensor(entropies).double(), torch.tensor(temperatures).double()
    if not values[0] <= target <= values[-1]:
        raise UserError(
            f"entropy {target:.3f} is not reached at temperatures {temperatures[0]:g} to {temperatures[-1]:g} "
            f"({values[0]:.3f} to {values[-1]:.3f} nats)"
        )
    right = int(torch.searchsorted(values, torch.tensor(target).double())) or 1
    share: Tensor = (target - values[right - 1]) / (values[right] - values[right - 1])
    return float(points[right - 1] + share * (points[right] - points[right - 1]))
