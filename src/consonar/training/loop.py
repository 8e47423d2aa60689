"""The training loop: the one place that calls `.backward()`. Every method of this library runs through it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consonar import checkpoint, distributed
from consonar.config import TrainConfig
from consonar.distributed import World
from consonar.tracking import Tracker
from consonar.training.optim import learning_rate, update_average
from consonar.types import Batch, Objective, Rollout


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient, the weights or a measurement is not finite; the message names the step, what to change,
    and the last checkpoint."""


class Batches(Protocol):
    """Random access by step, so that resuming needs no state, and an ordered walk for validation."""

    def batch(self, step: int) -> Batch: ...
    def ordered(self, batch_size: int) -> Iterator[Batch]: ...


@dataclass
class Callbacks:
    """What the loop does beside training, each at its own interval and at the end."""

    validate: Callable[[Any], dict[str, float]] | None = None
    """Metrics of the trainee with its (averaged) weights."""
    preview: Callable[[Any, Path], None] | None = None
    """Writes a picture of what the trainee makes to the given path."""
    keep_best: Callable[[Any, int, dict[str, float]], None] | None = None
    """Keeps the trainee, at this step and with these validation metrics, if it is the best so far."""


@dataclass
class State:
    """What moves during training; all of it is in a resume checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None = None
    step: int = 0
    stopped: str | None = None
    """Why the objective ended training early."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def payload(self) -> dict[str, Any]:
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "random": random_state,
        }

    def restore(self, payload: dict[str, Any], where: str) -> None:
        checkpoint.load_weights(self.model, payload["model"], where)
        self.optimizer.load_state_dict(payload["optimizer"])
        if self.average is not None and payload["average"] is not None:
            self.average = {key: value.to(self.device) for key, value in payload["average"].items()}
        torch.set_rng_state(payload["random"]["cpu"])
        if "cuda" in payload["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(payload["random"]["cuda"], self.device)
        self.step = payload["step"]


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
) -> None:
    """Trains `state.model` in place from `state.step` to `config.loop.steps`, or to `stop_at` when that is earlier.

    Ends before that, with all that the end does, when the objective finds a breach (`state.stopped`). Raises
    `NonFiniteLoss` in the step that makes such a number, before its weights are saved; the last checkpoint stays.
    Where it was the loss or its gradient, the weights are those before the step.
    """
    loop, device = config.loop, state.device
    autocast_dtype = distributed.pick_precision(loop.precision, device)
    model = distributed.wrap(state.model, world)
    last = min(loop.steps, stop_at or loop.steps)
    clock, clock_step = time.monotonic(), state.step
    model.train()
    if callbacks.validate and state.step == 0 and config.init:
        validate(state, callbacks, tracker, world, folder)  # where the run starts from is worth a line
    for step in range(state.step, last):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, loop.steps, config.optim)
        batch = to_device(batches.batch(step), device)
        for rollout in objective.rollout(state.model, batch, step):
            terms = update(model, state, objective, rollout, step, config, autocast_dtype, folder)
        state.step = step + 1
        if state.average is not None:
            update_average(state.average, state.model, loop.ema_decay)
        tracker.advance(state.step)
        at_end = state.step == loop.steps
        if state.step % loop.log_every == 0 or at_end:
            values = distributed.mean_over_ranks({key: float(value) for key, value in terms.items()}, world)
            state.stopped = objective.breach(values)
            rate = (state.step - clock_step) / (time.monotonic() - clock)
            values |= {"learning_rate": state.optimizer.param_groups[0]["lr"], **objective.state(step)}
            tracker.log(state.step, {f"train/{key}": value for key, value in values.items()}, rate=rate)
            clock, clock_step = time.monotonic(), state.step
        if callbacks.validate and (due(state.step, loop.validate_every) or at_end or state.stopped):
            measured = validate(state, callbacks, tracker, world, folder)
            state.stopped = state.stopped or objective.breach(measured)
        if callbacks.preview and world.is_main and (due(state.step, loop.sample_every) or at_end or state.stopped):
            with evaluation_weights(state):
                callbacks.preview(state.model, folder / "samples" / f"step_{state.step:06d}.png")
        if world.is_main and (due(state.step, loop.save_every) or state.step == last or state.stopped):
            checkpoint.save_resume(folder / "checkpoints", state.step, state.payload(), loop.keep_checkpoints)
        if state.stopped:
            tracker.warn(f"stopped at step {state.step}: {state.stopped}; the model of this step is kept")
            break
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
        with torch.autocast(state.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            loss, terms = objective.loss(model, part, step)
        if index < len(parts) - 1:
            with distributed.without_sync(model):
                (loss / len(parts)).backward()
        else:
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


def non_finite(step: int, found: str, folder: Path) -> NonFiniteLoss:
    """The error of a run in `folder` that met such a number."""
    saved = checkpoint.list_resume(folder / "checkpoints")
    kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return NonFiniteLoss(f"step {step}: {found}; lower optim.lr or the weights of the objective; {kept}")


def validate(state: State, callbacks: Callbacks, tracker: Tracker, world: World, folder: Path) -> dict[str, float]:
    """Validation metrics with the averaged weights, logged; the model is kept where it is the best so far."""
    assert callbacks.validate is not None
    with evaluation_weights(state):
        measured = callbacks.validate(state.model)
        if wrong := [key for key, value in measured.items() if not math.isfinite(value)]:
            raise non_finite(state.step, f"validation {wrong[0]} is {measured[wrong[0]]}", folder)
        if callbacks.keep_best and world.is_main:
            callbacks.keep_best(state.model, state.step, measured)
    tracker.log(state.step, {f"validation/{key}": value for key, value in measured.items()})
    return measured


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def to_device(batch: Batch, device: torch.device) -> Batch:
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def split(rollout: Rollout, parts: int) -> list[Rollout]:
    """Equal slices along the first dimension, so that the mean of their losses is the loss of the whole."""
    if parts == 1:
        return [rollout]

    def part(index: int) -> Rollout:
        return map_tensors(rollout, lambda tensor: tensor.chunk(parts)[index])

    return [part(index) for index in range(parts)]


def map_tensors(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclass with `function` applied to every tensor in it, nested dataclasses and dicts included."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = function(value)
        elif dataclasses.is_dataclass(value):
            changes[item.name] = map_tensors(value, function)
        elif isinstance(value, dict):
            changes[item.name] = {k: function(v) if isinstance(v, Tensor) else v for k, v in value.items()}
    return dataclasses.replace(record, **changes)


@contextmanager
def evaluation_weights(state: State) -> Iterator[None]:
    """Evaluation mode, without gradient, with the moving average of the weights where there is one; undone after it."""
    model = state.model
    with torch.inference_mode():
        own = None
        if state.average is not None:
            own = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            model.eval()
            if state.average is not None:
                model.load_state_dict(state.average)
            yield
        finally:
            if own is not None:
                model.load_state_dict(own)
            model.train()
