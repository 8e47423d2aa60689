"""Assembles a run from its configuration: data, model, objective, tracker; then hands over to the loop."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from consonar import distributed, memory, parallel
from consonar.compiling import compile_for_training
from consonar.config_io import from_dict, to_dict
from consonar.cpu import timing
from consonar.data.mixture import store_paths
from consonar.distributed import World
from consonar.errors import AGAIN, UserError, reading
from consonar.files.lock import hold, is_unused, remove_partials
from consonar.files.readers import home_expanded, read_json
from consonar.files.weights import finish_save, is_component
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.options import is_whole
from consonar.precision import multiplying
from consonar.training.build import build
from consonar.training.checkpoints import State, list_resume, load_resume
from consonar.training.config import TrainConfig
from consonar.training.loop import KERNELS, Built, Running, train_loop
from consonar.training.lora import moving
from consonar.training.objectives.alignment import AlignmentConfig
from consonar.training.optim import build_optimizer
from consonar.training.origins import FILE, check_same_origin, comparable, resolve_start
from consonar.training.tracking import Tracker, check_sinks, how_far

CONFIG = "config.json"
SESSIONS = "sessions.json"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool | None = False,
    stop_at: int | None = None,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Runs a configuration and returns the run folder `out`.

    The folder holds config.json, metrics.jsonl, samples/, checkpoints/ (to resume) and model/ (the released component:
    the generator without training-only heads, or the tokenizer). `resume` goes on from the last checkpoint (None: where
    the run has begun, as the first process finds it); the configuration must be the stored one. `stop_at` ends early at
    that step, as an interruption would: SIGTERM and Ctrl-C end training after the step, once it is saved. `on_step`
    gets the number of steps done after each.

    Raises `UserError` when the folder already has a run, or for data that do not fit, and `NonFiniteLoss`.
    """
    if stop_at is not None and not (is_whole(stop_at) and stop_at >= 1):
        raise UserError(f"--stop-at: {stop_at} is not a step, 1 or more")
    out = Path(out)
    # Float32 beside the steps, which `loop.precision` is of.
    with distributed.joined(config.loop.device) as world, multiplying("fp32", world.device):
        batch_size = config.loop.batch_of_process(world.size)
        config = with_validation(resolve_start(config))
        check_sinks(config.loop.trackers)
        if resume is None:
            resume = distributed.from_main((out / CONFIG).exists(), world)
        check_folder(config, out, resume)
        if resume:
            timing.go_on_with(out / KERNELS)
        chosen = config.loop.multiplied_in(world)  # as the run did, whatever has been measured since
        config.parallel.check(chosen, world.size)
        with held(out, world):
            check_folder(config, out, resume)  # it may have become another process's run before it was held
            captions = how_far(f"{config.recipe}: captions", quiet=quiet or not world.is_main)
            built = build(config, world, batch_size, out, captions)
            if resume:
                check_same_origin(out, built.origin)
            state = start_state(config, built, world)
            note = restore(state, out, world, config) if resume else None
            describe(config, built, out, world)
            if state.step < config.loop.steps and not state.stopped:
                add_session(config, chosen, state.step, out, world)
            tracker = Tracker(out, config, resume_step=state.step, enabled=world.is_main, quiet=quiet, on_step=on_step)
            for line in built.about:
                tracker.say(line)
            if note:
                tracker.warn(note)
            kept = {"moving average": (state.average or {}).values()}
            explained = memory.explained(smaller(config), world.device, kept)
            with signals_held(world.size == 1) as caught, closing(tracker), explained:
                train_loop(Running(config, built, state, tracker, out, world, caught), stop_at)
                if state.interrupted and signal.SIGINT not in caught:  # Ctrl-C: the command line says so
                    tracker.warn(f"asked to end; step {state.step} is saved, --resume goes on from there")
            if not state.interrupted and (state.step == config.loop.steps or state.stopped):
                export(built, state, out, world)
            tracker.say(f"run folder: {out}")
    return out


def smaller(config: TrainConfig) -> str:
    """What to change for a run of less memory, with the settings' values: first what leaves the results as they are."""
    loop, objective, ways = config.loop, config.objective, []
    if loop.accumulation < loop.batch_size:
        ways.append(f"raise loop.accumulation ({loop.accumulation})")
    if loop.activation_checkpointing != 1:
        ways.append(f"set loop.activation_checkpointing ({loop.activation_checkpointing}) to 1")
    if isinstance(objective, AlignmentConfig) and objective.chunk != 1:
        ways.append(f"lower objective.chunk ({objective.chunk})" if objective.chunk else "set objective.chunk (0) to 8")
    ways.append(f"lower loop.batch_size ({loop.batch_size})")
    if config.run != "post-training":
        ways.append("make the model smaller (model.*)")
    return " or ".join(ways)


@contextmanager
def held(out: Path, world: World) -> Iterator[None]:
    """Rank 0 holds the run folder for all of them; where it cannot, all raise `UserError`."""
    with ExitStack() as stack:
        refusal = None
        if world.is_main:
            try:
                stack.enter_context(hold(out))
                remove_partials(out)
                for part in ("model", "best", "discriminator"):
                    finish_save(out / part)
            except UserError as error:
                refusal = str(error)
            except OSError as error:
                refusal = f"--out: {error.filename or out}: {error.strerror}"
        refusal = distributed.from_main(refusal, world)
        if refusal is not None:
            raise UserError(refusal)
        yield


@contextmanager
def signals_held(alone: bool) -> Iterator[Collection[int]]:
    """SIGTERM (a scheduler that takes the machine back), Ctrl-C and a closed terminal end training after a checkpoint.

    Inside of it signals are collected, for the loop to ask; where the process is `alone` one that comes `AGAIN` seconds
    after the first acts at once. At the end they are raised again, so that the process ends as one that was
    interrupted; after SIGTERM, which nobody else catches, with status 0. Signals belong to the main thread: in another
    one nothing is caught. One that the process was started to ignore (nohup; jobs in the background of a script) stays
    ignored.
    """
    caught: dict[int, float] = {}
    with ExitStack() as before:

        def remember(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if alone and caught and now - min(caught.values()) > AGAIN:
                before.close()
                signal.raise_signal(number)
            caught.setdefault(number, now)

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    before.callback(signal.signal, number, signal.signal(number, remember))
        yield caught
    for number in caught:  # after an error it is not: that is what ends the process
        if number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL:
            raise SystemExit(0)  # all is saved: for a scheduler the job has done what it was asked
        signal.raise_signal(number)


def start_state(config: TrainConfig, built: Built, world: World) -> State:
    """The trainee on its device, sharded and compiled where that is wanted, with its optimizer and moving average."""
    chosen = config.loop.multiplied_in(world)
    parallel.shard(built.trainee, built.trainee.parts(), config.parallel, world)
    trainee = built.trainee.to(world.device)
    if config.loop.compile:
        low = chosen == "bf16"
        if config.run == "tokenizer" and world.device.type == "cpu" and low:  # as of PyTorch 2.13; seen, not understood
            raise UserError(
                "loop.compile: PyTorch's compiler loses gradients of a tokenizer's convolutions in bf16 on a CPU; set "
                "loop.precision fp32, or leave loop.compile away"
            )
        for part in trainee.parts():
            compile_for_training(part)
    average = {k: v.detach().clone() for k, v in moving(trainee).items()} if config.loop.ema_decay else None
    return State(trainee, build_optimizer(trainee, config.optim), average)


def describe(config: TrainConfig, built: Built, out: Path, world: World) -> None:
    """Writes what the run is into its folder, once all processes have read what was there."""
    distributed.barrier(world)
    if world.is_main:
        (out / "stopped.json").unlink(missing_ok=True)  # written again where the checkpoint says so
        write_json(out / CONFIG, to_dict(config))
        write_json(out / FILE, to_dict(built.origin))
        if built.bad is not None:
            built.bad.write()


def add_session(config: TrainConfig, precision: str, step: int, out: Path, world: World) -> None:
    """Adds to sessions.json what the run is calculated on, and in what precision, from this step on."""
    session = {
        "step": step, "precision": precision, "machine": distributed.machine_name(world.device),
        "processes": world.size, "parallel": config.parallel.used(world), "torch": torch.__version__,
    }  # fmt: skip
    if world.is_main:
        write_json(out / SESSIONS, {"sessions": [*sessions_before(step, out / SESSIONS), session]})


def sessions_before(step: int, path: Path) -> list[Json]:
    """Those of a sessions.json that began before a step; none where older versions wrote none."""
    known = read_json(path, "remove it") if path.exists() else {"sessions": []}
    with reading(path, "the sessions of a run", "remove it"):
        return [session for session in known["sessions"] if session["step"] < step]


def export(built: Built, state: State, out: Path, world: World) -> None:
    """Writes the released component, with the averaged weights where there are such; and why training ended early."""
    with state.averaged() as model:
        if not world.is_main:
            return
        if state.stopped:
            write_json(out / "stopped.json", {"step": state.step, "reason": state.stopped})
        model.export(out, built.origin)


def restore(state: State, out: Path, world: World, config: TrainConfig) -> str | None:
    """Restores the last checkpoint of the run, where there is one; says when other processes than these wrote it,
    where that changes anything.

    Raises `UserError` for a run with several updates on each batch that an older version began: it counted them as
    one step.
    """
    saved = list_resume(out / "checkpoints")
    if not saved:
        return None
    payload, updates = load_resume(saved[-1], state.place), config.objective.updates
    if payload.get("updates", 1) != updates:
        raise UserError(
            f"--resume: {saved[-1]} counts the {updates} updates on a batch as one step, as older versions did; start "
            "another run"
        )
    state.restore(payload, str(saved[-1]))
    before = payload.get("processes", world.size)  # older checkpoints do not say
    parts = [vars(part) for part in (config.model, config.lora) if part is not None]
    drops = any(value for settings in parts for name, value in settings.items() if "drop" in name)
    if before == world.size or not drops:
        return None
    return (
        f"step {state.step} was reached on {before} processes, now there are {world.size}: dropout is drawn otherwise"
    )


def with_validation(config: TrainConfig) -> TrainConfig:
    """The configuration with the validation store that lies beside the training store (every one of several) named,
    where it was left open."""
    paths = store_paths(config.data.tokens) if config.data.tokens else []
    beside = [f"{home_expanded(path)}-validation" for path in paths]
    if beside and config.data.validation_tokens is None and all(map(os.path.isdir, beside)):
        return replace(config, data=replace(config.data, validation_tokens=",".join(beside)))
    return config


def check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuses a folder that holds a run, unless `resume` is set and the run is this one."""
    stored = out / CONFIG
    if not stored.exists() or is_component(out):
        if out.exists() and (not out.is_dir() or not is_unused(out)):
            raise UserError(f"--out: {out} exists and is not a run; choose another folder")
        if resume:
            raise UserError(f"--resume: {out} holds no run")
        return
    if not resume:
        raise UserError(f"--out: {out} already holds a run; choose another folder, or add --resume to go on with it")
    # Tuples are lists in JSON: compare what would be written; an option that is newer than the run has its default.
    begun = from_dict(read_json(stored), str(stored), TrainConfig)
    before, now = (comparable(json.loads(json.dumps(to_dict(settings))), out) for settings in (begun, config))
    for key in now | before:
        if key not in now or key not in before or now[key] != before[key]:
            ours, theirs = now.get(key), before.get(key)
            raise UserError(f"--resume: {key} is {ours!r}, but the run in {out} was started with {theirs!r}")
    if (out / "model" / "model.safetensors").exists() and not list_resume(out / "checkpoints"):
        raise UserError(
            f"--resume: {out} holds a trained model and no checkpoint to go on from; training would begin anew and "
            "replace it: choose another folder, or remove this one"
        )
