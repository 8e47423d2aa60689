"""What a run does beside its steps: lines of metrics, validation, pictures, checkpoints, each at its own interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consonar import distributed
from consonar.cpu import timing
from consonar.distributed import World
from consonar.errors import NonFiniteLoss, UserError, reading
from consonar.files.weights import check_plain, check_weights, load_weights
from consonar.training.config import TrainConfig
from consonar.training.resume import RESUME_REMEDY, list_resume, save_resume
from consonar.training.tracking import Tracker
from consonar.types import Objective

INTERRUPTED = "interrupted"
KERNELS = "kernels.json"
"""What the machine decided for the run: it is resumed in the same way."""


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
    """What moves during training; all but `interrupted` and the device is in a resume checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None = None
    step: int = 0
    stopped: str | None = None
    """Why the objective ended training early."""
    interrupted: bool = False
    """Whether training ended early, after a checkpoint, because it was asked to."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def payload(self) -> dict[str, Any]:
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return states | {"average": self.average, "stopped": self.stopped}

    def restore(self, payload: dict[str, Any], where: str) -> None:
        """Goes on from what `load_resume` read; `UserError` for a part that is missing or something else."""
        parts = ("model", "optimizer") if self.average is None else ("model", "optimizer", "average")
        for part in parts:
            if not isinstance(payload.get(part), dict):
                raise UserError(f"{where}: holds no {part}; {RESUME_REMEDY}")
            if part != "optimizer":
                check_weights(self.model.state_dict(), payload[part], where)
                check_plain(payload[part], where)
        load_weights(self.model, payload["model"], where)
        with reading(where, "a resume file", RESUME_REMEDY):
            self.optimizer.load_state_dict(payload["optimizer"])
        if self.average is not None:
            self.average = {key: value.to(self.device) for key, value in payload["average"].items()}
        stopped = payload.get("stopped")
        self.step, self.stopped = payload["step"], stopped if isinstance(stopped, str) else None


@dataclass
class Intervals:
    """Does what is due beside a step of `state`; made once per call of `train_loop`."""

    config: TrainConfig
    state: State
    objective: Objective[Any, Any]
    callbacks: Callbacks
    tracker: Tracker
    folder: Path
    world: World
    interrupted: Callable[[], bool]

    def __post_init__(self) -> None:
        self.clock, self.clock_step = time.monotonic(), self.state.step

    def due(self, every: int) -> bool:
        return due(self.state.step, every, self.config.objective.updates)

    @property
    def at_end(self) -> bool:
        return self.state.step == self.config.loop.steps

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step_{self.state.step:06d}.png"

    def begin(self) -> None:
        """Measures where a run with a start model begins; after a resume, what is missing at the checkpoint's step.

        There the process ended while it measured, or because it failed to. Failing again is a warning, else every
        resume of the run would end here; but numbers that are not finite are an error again.
        """
        state, step, loop = self.state, self.state.step, self.config.loop
        if step == 0:
            if self.callbacks.validate and self.config.init:
                self.validate()  # where the run starts from is worth a line
            return
        known = distributed.from_main(self.tracker.has(step, "validation/"), self.world)
        ends = self.at_end or bool(state.stopped)
        if self.callbacks.validate and not known and (self.due(loop.validate_every) or ends):
            try:
                breach = self.objective.breach(self.validate())
                state.stopped = state.stopped or breach
            except NonFiniteLoss:
                raise
            except Exception as error:
                self.tracker.warn(f"the validation of step {step} is left out: {one_line(error)}")
        if (self.due(loop.sample_every) or ends or state.stopped) and not self.picture.exists():
            self.preview()

    def log(self, terms: Mapping[str, Tensor]) -> None:
        """A line of metrics where one is due. Sets `state.stopped` by what it says, and `state.interrupted`."""
        state, loop = self.state, self.config.loop
        state.interrupted = self.interrupted() and self.world.size == 1  # several processes agree in the next line
        if not self.due(loop.log_every) and not self.at_end:
            return
        values = {key: float(value) for key, value in terms.items()} | {INTERRUPTED: float(self.interrupted())}
        values = distributed.mean_over_ranks(values, self.world)
        state.interrupted = values.pop(INTERRUPTED) > 0
        state.stopped = self.objective.breach(values)
        rate = (state.step - self.clock_step) / (time.monotonic() - self.clock)
        rates = {"learning_rate": state.optimizer.param_groups[0]["lr"], **self.objective.state(state.step - 1)}
        self.tracker.log(state.step, {f"train/{key}": value for key, value in (values | rates).items()}, rate=rate)
        self.clock, self.clock_step = time.monotonic(), state.step

    def measure(self) -> None:
        """Validation and a picture where they are due; a breach that validation finds is `state.stopped`, and saved."""
        state, loop = self.state, self.config.loop
        if self.callbacks.validate and (self.due(loop.validate_every) or self.at_end or state.stopped):
            breach = self.objective.breach(self.validate())
            if breach and not state.stopped:
                state.stopped = breach
                self.save()
        if self.due(loop.sample_every) or self.at_end or state.stopped:
            self.preview()

    def validate(self) -> dict[str, float]:
        """Validation metrics with the averaged weights, logged; the model is kept where it is the best so far."""
        state, callbacks = self.state, self.callbacks
        assert callbacks.validate is not None  # asked only where there is one
        with evaluation_weights(state):
            measured = callbacks.validate(state.model)
            if wrong := [key for key, value in measured.items() if not math.isfinite(value)]:
                raise non_finite(state.step, f"validation {wrong[0]} is {measured[wrong[0]]}", self.folder)
            if callbacks.keep_best and self.world.is_main:
                callbacks.keep_best(state.model, state.step, measured)
        self.tracker.log(state.step, {f"validation/{key}": value for key, value in measured.items()})
        return measured

    def preview(self) -> None:
        """Writes a picture of what the trainee makes. No result depends on it, so failing is a warning."""
        if self.callbacks.preview is None or not self.world.is_main:
            return
        try:
            with evaluation_weights(self.state):
                self.callbacks.preview(self.state.model, self.picture)
        except Exception as error:
            self.tracker.warn(f"no picture of step {self.state.step}: {one_line(error)}")

    def save(self) -> None:
        """A resume checkpoint."""
        if self.world.is_main:
            folder, keep = self.folder / "checkpoints", self.config.loop.keep_checkpoints
            timing.keep_for_run(self.folder / KERNELS)
            payload = self.state.payload() | {"processes": self.world.size, "updates": self.config.objective.updates}
            save_resume(folder, self.state.step, payload, keep)


def due(step: int, every: int, updates: int = 1) -> bool:
    """Whether a multiple of `every` was reached by the last `updates` steps."""
    return every > 0 and step % every < updates


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def non_finite(step: int, found: str, folder: Path) -> NonFiniteLoss:
    """The error of a run in `folder` that met such a number."""
    saved = list_resume(folder / "checkpoints")
    kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return NonFiniteLoss(f"step {step}: {found}; lower optim.lr or the weights of the objective; {kept}")


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
