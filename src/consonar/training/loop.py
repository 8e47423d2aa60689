"""The training loop: the one place that calls `.backward()`. Every method of this library runs through it.

Beside its steps a run writes lines of metrics, validates, draws pictures and saves, each at its own interval.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consonar import distributed, parallel, precision
from consonar.cpu import timing
from consonar.data.bad_images import BadImages
from consonar.data.loader import Batches
from consonar.distributed import World
from consonar.errors import NonFiniteLoss, one_line
from consonar.origin import Origin
from consonar.records import split, to_device
from consonar.seeding import derive_seed
from consonar.training.best import METRIC, DistanceToHeldOut, KeepBest
from consonar.training.checkpoints import Saver, State, list_resume
from consonar.training.config import TrainConfig
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.optim import learning_rate, update_average
from consonar.training.rewards import TIES
from consonar.training.tracking import Tracker
from consonar.training.trainee import Trainee
from consonar.types import Objective

INTERRUPTED = "interrupted"
IDLE_LINES = 10
KERNELS = "kernels.json"
"""What the machine decided for the run: it is resumed in the same way."""


@dataclass
class Built:
    """What a run trains, on what, and what it does beside that, at intervals and at the end."""

    trainee: Trainee | TokenizerTrainee
    objective: Objective[Any, Any]
    batches: Batches[Any]
    held_out: Batches[Any] | None = None
    """What the trainee is validated on, with its (averaged) weights."""
    preview: Callable[[Any, Path], None] | None = None
    """Writes a picture of what the trainee makes to the given path."""
    distance: DistanceToHeldOut | None = None
    """Of the generator's samples: one of the validation metrics, `METRIC`."""
    best: KeepBest | None = None
    """Keeps the best model by one of the validation metrics."""
    origin: Origin = field(default_factory=Origin)
    """What the run is made of, by content."""
    about: tuple[str, ...] = ()
    """Lines about the pictures and classes that it reads."""
    bad: BadImages | None = None
    """What cannot be read of them."""


def train_loop(run: Running, stop_at: int | None = None) -> None:
    """Trains `state.model` in place from `state.step` to `config.loop.steps`, or to `stop_at` when that is earlier.

    Steps are those of the optimiser; an objective may want several on each batch, which then end together. Ends before
    that, with all that the end does, when the objective finds a breach (`state.stopped`), and with nothing but a
    checkpoint once a signal is caught (several processes: at the next line of metrics). Raises `NonFiniteLoss` in the
    step whose loss or gradient is such a number, and leaves the weights that were before it; for weights that a step
    made before they are logged, saved, measured or shown, at the latest by the loss that they give. The last checkpoint
    stays. However it ends, no checkpoint is being written any more.
    """
    state, loop, updates = run.state, run.config.loop, run.config.objective.updates
    multiplied_in = loop.multiplied_in(run.world)
    model = parallel.wrap(state.model, run.world)
    last = min(loop.steps, stop_at or loop.steps)
    model.train()
    run.begin()
    with run.saver:
        while state.step < last and not state.stopped:
            batch = to_device(run.built.batches.batch(state.step // updates), run.world.device)
            with precision.multiplying(multiplied_in, run.world.device):
                prepared = run.built.objective.prepare(state.model, batch, state.step)
                for _ in range(min(updates, loop.steps - state.step)):
                    terms = update(run, model, prepared, precision.autocast_type(multiplied_in))
            run.saver.check()
            run.tracker.advance(state.step)
            if run.looks:
                run.check_weights()
            run.log(terms)
            # Before all that is optional: what fails below costs no step.
            if run.due(loop.save_every) or state.step >= last or state.stopped or state.interrupted:
                run.save()
            if state.interrupted:
                break
            run.measure()
    if state.stopped:
        run.tracker.warn(f"stopped at step {state.step}: {state.stopped}; the model of this step is kept")
    elif state.step < loop.steps and not state.interrupted:
        run.tracker.say(f"step {state.step} of {loop.steps} is saved, --resume goes on from there")
    distributed.barrier(run.world)


def update(run: Running, model: nn.Module, prepared: object, autocast_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """One optimiser step of `model` (that of the state, maybe wrapped) in micro-batches; returns the mean terms."""
    config, state, step = run.config, run.state, run.state.step
    # Only dropout draws from the global generator. Seeded in every step and process, it has no state to keep.
    torch.manual_seed(derive_seed(config.seed, "dropout", run.world.rank, step))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.loop.steps, config.optim)
    parts = split(prepared, config.loop.accumulation)
    sums: dict[str, Tensor] = {}
    torch.clear_autocast_cache()  # what `prepare` cast has no gradient
    for index, part in enumerate(parts):
        with parallel.exchange_of_gradients(model, index == len(parts) - 1):
            with torch.autocast(run.world.device.type, autocast_dtype, enabled=autocast_dtype is not None):
                loss, terms = run.built.objective.loss(model, part, step)
            (loss / len(parts)).backward()
        for key, value in {"loss": loss, **terms}.items():
            sums[key] = sums.get(key, 0) + value.detach().float() / len(parts)
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm))
    # Of all processes: one that ended alone, for a loss that only it has, would leave the others waiting.
    found = distributed.sum_over_ranks(torch.stack([sums["loss"], norm]), run.world) / run.world.size
    if not torch.isfinite(found.sum()):  # the one number of a step that is waited for
        state.optimizer.zero_grad(set_to_none=True)
        raise non_finite(run, step, f"loss {float(found[0])}, gradient norm {float(found[1])}")
    state.optimizer.step()
    torch.clear_autocast_cache()  # PyTorch does so at the end of the outermost context alone, which is around the run
    state.optimizer.zero_grad(set_to_none=True)
    state.step = step + 1
    if state.average is not None:
        update_average(state.average, state.model, config.loop.ema_decay)
    return sums | {"grad_norm": norm}


@dataclass
class Running:
    """A run in the loop; does what is due beside a step of `state`."""

    config: TrainConfig
    built: Built
    state: State
    tracker: Tracker
    folder: Path
    world: World
    caught: Collection[int] = ()
    """Signals that ask the run to end."""
    idle: Counter[str] = field(default_factory=Counter)
    """Of every reward at how many logged updates in a row it told no draw from another."""

    @cached_property
    def saver(self) -> Saver:
        loop = self.config.loop
        return Saver(self.folder / "checkpoints", loop.keep_checkpoints, self.world, loop.async_save)

    def due(self, every: int) -> bool:
        """Whether a multiple of `every` was reached by the last updates, of which there may be several on a batch."""
        return every > 0 and self.state.step % every < self.config.objective.updates

    @property
    def ends(self) -> bool:
        return self.state.step == self.config.loop.steps or bool(self.state.stopped)

    @property
    def looks(self) -> bool:
        """Whether weights are logged, measured or shown at this step."""
        loop = self.config.loop
        return self.ends or any(self.due(every) for every in (loop.log_every, loop.validate_every, loop.sample_every))

    def check_weights(self) -> None:
        """Raises `NonFiniteLoss` for weights that are not finite; called before anything is made of those of a step."""
        size = parallel.full(torch.nn.utils.get_total_norm(self.state.model.parameters()))
        size = distributed.sum_over_ranks(size, self.world) / self.world.size
        if not torch.isfinite(size.square()):  # weights whose squares are not float32 make no finite activations either
            raise non_finite(self, self.state.step - 1, f"the step made weights of norm {float(size)}")

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step_{self.state.step:06d}.png"

    def begin(self) -> None:
        """Measures where a run with a start model begins; after a resume, what is missing at the checkpoint's step.

        There the process ended while it measured, or because it failed to. Failing again is a warning, else every
        resume of the run would end here; but numbers that are not finite are an error again.
        """
        state, step, loop = self.state, self.state.step, self.config.loop
        self.clock, self.clock_step = time.monotonic(), step
        if step == 0:
            if self.config.init:
                self.judge(self.measured())  # where the run starts from is worth a line
            return
        there = self.tracker.has(step, "validation/"), self.picture.exists()
        known, drawn = distributed.from_main(there, self.world)
        if not known and (self.due(loop.validate_every) or self.ends):
            failed, measured = "", dict[str, float]()
            try:
                measured = self.measured()
            except NonFiniteLoss:
                raise
            except Exception as error:
                failed = one_line(error)
            if faults := list(filter(None, distributed.of_every(failed, self.world))):
                self.tracker.warn(f"the validation of step {step} is left out: {faults[0]}")
            elif breach := self.judge(measured):
                state.stopped = state.stopped or breach
        if (self.due(loop.sample_every) or self.ends) and not drawn:
            self.preview()

    def log(self, terms: Mapping[str, Tensor]) -> None:
        """A line of metrics where one is due. Sets `state.stopped` by what it says, and `state.interrupted`."""
        state, loop = self.state, self.config.loop
        state.interrupted = bool(self.caught) and self.world.size == 1  # several processes agree in the next line
        if not self.due(loop.log_every) and not self.ends:
            return
        values = {key: float(value) for key, value in terms.items()} | {INTERRUPTED: float(bool(self.caught))}
        values = distributed.mean_over_ranks(values, self.world)
        state.interrupted = values.pop(INTERRUPTED) > 0
        state.stopped = distributed.from_main(self.built.objective.breach(values), self.world)
        rate = (state.step - self.clock_step) / (time.monotonic() - self.clock)
        rates = {"learning_rate": state.optimizer.param_groups[0]["lr"], **self.built.objective.state(state.step - 1)}
        self.tracker.log(state.step, {f"train/{key}": value for key, value in (values | rates).items()}, rate=rate)
        self.look_for_idle_rewards(values)
        self.clock, self.clock_step = time.monotonic(), state.step

    def look_for_idle_rewards(self, values: Mapping[str, float]) -> None:
        """Warns once of a reward that told no draw from another at `IDLE_LINES` logged updates in a row."""
        for key, share in values.items():
            if key.startswith(TIES):
                self.idle[key] = self.idle[key] + 1 if share > 1 - 1e-4 else 0  # a mean of ones is rounded
                if self.idle[key] == IDLE_LINES:
                    name = key.removeprefix(TIES)
                    self.tracker.warn(f"reward {name!r} is the same for all draws of every image: it teaches nothing")

    def measure(self) -> None:
        """Validation and a picture where they are due; a breach that validation finds is `state.stopped`, and saved."""
        state, loop = self.state, self.config.loop
        if self.due(loop.validate_every) or self.ends:
            breach = self.judge(self.measured())
            if breach and not state.stopped:
                state.stopped = breach
                self.save()
        if self.due(loop.sample_every) or self.ends:
            self.preview()

    def measured(self) -> dict[str, float]:
        """Validation metrics as this process finds them, none without data for it; rank 0 keeps the best model."""
        state, built, held_out = self.state, self.built, self.built.held_out
        if held_out is None:
            return {}
        batches = held_out.ordered(held_out.batch_size, self.config.data.validation_items)
        with state.averaged() as model:
            here = (to_device(batch, self.world.device) for batch in batches)
            measured = built.objective.validate(model, here)
            if built.distance:
                measured[METRIC] = built.distance(model.generator)
            if built.best and self.world.is_main and all(map(math.isfinite, measured.values())):
                built.best.keep(model, state.step, measured[built.best.metric])
        return measured

    def judge(self, measured: dict[str, float]) -> str | None:
        """Logs the metrics of rank 0 and says why training must stop: by rounding another process may see a number on
        the other side of a bound."""
        if not (measured := distributed.from_main(measured, self.world)):
            return None
        if wrong := [key for key, value in measured.items() if not math.isfinite(value)]:
            raise non_finite(self, self.state.step, f"validation {wrong[0]} is {measured[wrong[0]]}")
        self.tracker.log(self.state.step, {f"validation/{key}": value for key, value in measured.items()})
        return self.built.objective.breach(measured)

    def preview(self) -> None:
        """Writes a picture of what the trainee makes. No result depends on it, so failing is a warning."""
        if self.built.preview is None:
            return
        with self.state.averaged() as model:
            if self.world.is_main:
                try:
                    self.built.preview(model, self.picture)
                except Exception as error:
                    self.tracker.warn(f"no picture of step {self.state.step}: {one_line(error)}")

    def save(self) -> None:
        self.check_weights()
        if self.world.is_main:
            timing.keep_for_run(self.folder / KERNELS)
        payload = self.state.payload() | {"processes": self.world.size, "updates": self.config.objective.updates}
        self.saver.save(self.state.step, payload)


def non_finite(run: Running, step: int, found: str) -> NonFiniteLoss:
    """The error of a run that met such a number."""
    run.saver.wait()
    saved = list_resume(run.saver.folder)
    kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return NonFiniteLoss(f"step {step}: {found}; lower optim.lr or the weights of the objective; {kept}")
