"""The training loop: the one place that calls `.backward()`. Every method of this library runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from consonar import distributed
from consonar.config import TrainConfig
from consonar.distributed import World
from consonar.placement import map_tensors, to_device
from consonar.seeding import derive_seed
from consonar.tracking import Tracker
from consonar.training.aside import Aside, Callbacks, NonFiniteLoss, State, due, non_finite
from consonar.training.optim import learning_rate, update_average
from consonar.types import Batch, Objective, Rollout

__all__ = ["Batches", "Callbacks", "NonFiniteLoss", "State", "split", "train_loop"]


class Batches(Protocol):
    """Random access by step, so that resuming needs no state, and an ordered walk for validation."""

    def batch(self, step: int) -> Batch: ...
    def ordered(self, batch_size: int) -> Iterator[Batch]: ...


def train_loop(
    config: TrainConfig,
    state: State,
    objective: Objective,
    batches: Batches,
    *,
    tracker: Tracker,
    folder: Path,
    world: World,
    callbacks: Callbacks,
    stop_at: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Trains `state.model` in place from `state.step` to `config.loop.steps`, or to `stop_at` when that is earlier.

    Ends before that, with all that the end does, when the objective finds a breach (`state.stopped`), and with nothing
    but a checkpoint once `interrupted()` (several processes: at the next line of metrics). Raises `NonFiniteLoss` in
    the step that makes such a number, before its weights are saved; the last checkpoint stays. Where it was the loss or
    its gradient, the weights are those before the step.
    """
    loop, device = config.loop, state.device
    autocast_dtype = distributed.pick_precision(loop.precision, device)
    model = distributed.wrap(state.model, world)
    last = min(loop.steps, stop_at or loop.steps)
    aside = Aside(config, state, objective, callbacks, tracker, folder, world, interrupted)
    model.train()
    aside.begin()
    for step in range(state.step, state.step if state.stopped else last):
        # Only dropout draws from the global generator. Seeded in every step and process, it has no state to keep.
        torch.manual_seed(derive_seed(config.seed, "dropout", world.rank, step))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, loop.steps, config.optim)
        batch = to_device(batches.batch(step), device)
        for rollout in objective.rollout(state.model, batch, step):
            terms = update(model, state, objective, rollout, step, config, autocast_dtype, folder)
        state.step = step + 1
        if state.average is not None:
            update_average(state.average, state.model, loop.ema_decay)
        tracker.advance(state.step)
        aside.log(terms)
        # Before all that is optional: what fails below costs no step.
        if due(state.step, loop.save_every) or state.step == last or state.stopped or state.interrupted:
            aside.save()
        if state.interrupted:
            break
        aside.measure()
        if state.stopped:
            break
    if state.stopped:
        tracker.warn(f"stopped at step {state.step}: {state.stopped}; the model of this step is kept")
    distributed.barrier(world)


def update(
    model: nn.Module,
    state: State,
    objective: Objective,
    rollout: Rollout,
    step: int,
    config: TrainConfig,
    autocast_dtype: torch.dtype | None,
    folder: Path,
) -> dict[str, Tensor]:
    """One optimiser step on one rollout, in `accumulation` micro-batches; returns the mean terms."""
    parts = split(rollout, config.loop.accumulation)
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
    return sums | {"grad_norm": norm}


def split(rollout: Rollout, parts: int) -> list[Rollout]:
    """Equal slices along the first dimension, so that the mean of their losses is the loss of the whole."""
    if parts == 1:
        return [rollout]

    def part(index: int) -> Rollout:
        return map_tensors(rollout, lambda tensor: tensor.chunk(parts)[index])

    return [part(index) for index in range(parts)]
