"""The training loop: the one place that calls `.backward()`. Every method of this library runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from consonar import distributed, precision
from consonar.distributed import World
from consonar.records import split, to_device
from consonar.seeding import derive_seed
from consonar.training.config import TrainConfig
from consonar.training.intervals import Callbacks, Intervals, State, due, non_finite
from consonar.training.optim import learning_rate, update_average
from consonar.training.tracking import Tracker
from consonar.types import Objective

Item = TypeVar("Item", covariant=True)


class Batches(Protocol[Item]):
    """Random access by number, so that resuming needs no state, and an ordered walk for validation."""

    batch_size: int

    def batch(self, step: int) -> Item: ...
    def ordered(self, batch_size: int, max_items: int = 0) -> Iterator[Item]: ...


def train_loop(
    config: TrainConfig,
    state: State,
    objective: Objective[Any, Any],
    batches: Batches[object],
    *,
    tracker: Tracker,
    folder: Path,
    world: World,
    callbacks: Callbacks,
    stop_at: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Trains `state.model` in place from `state.step` to `config.loop.steps`, or to `stop_at` when that is earlier.

    Steps are those of the optimiser; an objective may want several on each batch, which then end together. Ends before
    that, with all that the end does, when the objective finds a breach (`state.stopped`), and with nothing but a
    checkpoint once `interrupted()` (several processes: at the next line of metrics). Raises `NonFiniteLoss` in the step
    that makes such a number, before its weights are saved; the last checkpoint stays. Where it was the loss or its
    gradient, the weights are those before the step.
    """
    loop, device, updates = config.loop, state.device, config.objective.updates
    autocast_dtype = precision.pick_precision(loop.precision, device)
    model = distributed.wrap(state.model, world)
    last = min(loop.steps, stop_at or loop.steps)
    intervals = Intervals(config, state, objective, callbacks, tracker, folder, world, interrupted)
    model.train()
    intervals.begin()
    while state.step < last and not state.stopped:
        batch = to_device(batches.batch(state.step // updates), device)
        prepared = objective.prepare(state.model, batch, state.step)
        for _ in range(min(updates, loop.steps - state.step)):
            terms = update(model, state, objective, prepared, config, world, autocast_dtype, folder)
        tracker.advance(state.step)
        intervals.log(terms)
        # Before all that is optional: what fails below costs no step.
        if due(state.step, loop.save_every, updates) or state.step >= last or state.stopped or state.interrupted:
            intervals.save()
        if state.interrupted:
            break
        intervals.measure()
    if state.stopped:
        tracker.warn(f"stopped at step {state.step}: {state.stopped}; the model of this step is kept")
    distributed.barrier(world)


def update(
    model: nn.Module,
    state: State,
    objective: Objective[Any, Any],
    prepared: object,
    config: TrainConfig,
    world: World,
    autocast_dtype: torch.dtype | None,
    folder: Path,
) -> dict[str, Tensor]:
    """One optimiser step on a prepared batch, in `accumulation` micro-batches; returns the mean terms."""
    step = state.step
    # Only dropout draws from the global generator. Seeded in every step and process, it has no state to keep.
    torch.manual_seed(derive_seed(config.seed, "dropout", world.rank, step))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.loop.steps, config.optim)
    parts = split(prepared, config.loop.accumulation)
    sums: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        with distributed.exchange_of_gradients(model, index == len(parts) - 1):
            with torch.autocast(state.device.type, autocast_dtype, enabled=autocast_dtype is not None):
                loss, terms = objective.loss(model, part, step)
            (loss / len(parts)).backward()
        for key, value in {"loss": loss, **terms}.items():
            sums[key] = sums.get(key, 0) + value.detach().float() / len(parts)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    if not torch.isfinite(norm + sums["loss"]):
        state.optimizer.zero_grad(set_to_none=True)
        raise non_finite(step, f"loss {float(sums['loss'])}, gradient norm {float(norm)}", folder)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    size = torch.nn.utils.get_total_norm(model.parameters())
    if not torch.isfinite(size.square()):  # weights whose squares are not float32 make no finite activations either
        raise non_finite(step, f"loss {float(sums['loss'])}, but the step made weights of norm {float(size)}", folder)
    state.step = step + 1
    if state.average is not None:
        update_average(state.average, state.model, config.loop.ema_decay)
    return sums | {"grad_norm": norm}
