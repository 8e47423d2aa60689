"""What moves during training, checkpoints, `checkpoints/step_00001000.pt`, which hold all of it.

What moves is the trainee with its heads (of one with adapters these alone), the optimizer and the moving average: a run
goes on exactly. Where processes hold shards a checkpoint is a folder, `checkpoints/step_00001000`: `state.pt`, and
beside it the shards.
"""

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consonar import parallel, shards
from consonar.distributed import World, from_main, patience
from consonar.errors import UserError, one_line, reading
from consonar.files.readers import check_archive
from consonar.files.weights import check_finite, check_plain, check_weights
from consonar.files.writers import file_sha256, no_room_said, write_atomically
from consonar.records import device_of, map_tensors
from consonar.training.lora import merged, moving

FORMAT_VERSION = 1
RESUME_REMEDY = "remove it to resume from the one before"
STEP_FILE = re.compile(r"step_(\d{8})(\.pt)?")
STATE = "state.pt"
"""All of a checkpoint but what is in shards."""


def save_resume(folder: Path, step: int, payload: Mapping[str, object], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX.pt` and removes all but the last `keep` checkpoints."""
    path = folder / f"step_{step:08d}.pt"
    write_state(path, step, payload)
    remove_old(folder, keep)
    return path


def write_state(path: Path, step: int, payload: Mapping[str, object]) -> None:
    """Writes a file and reads it back.

    It has its name, and takes the place of another, once what was read back has the checksums of what was written.
    """

    def write(partial: Path) -> None:
        torch.save({"format_version": FORMAT_VERSION, "step": step, **payload}, partial)
        with reading(path, "what was written when it is read back", "it is not kept, the one before it is"):
            check_archive(partial)

    write_atomically(path, write)


def save_shards(path: Path, step: int, payload: dict[str, Any], keep: int, group: Any, is_main: bool) -> Path:
    """Writes the folder `path` of a step, with shards, as `save_resume` its file. In all processes at once, each in a
    thread, which talk in `group`.

    A folder that is there is of the same step, so its shards are the same: `state.pt` alone is written anew.
    """
    work = path.with_name(f".{path.name}.partial")
    state, found = shards.parted(payload)
    try:
        with no_room_said(path):
            if group is not None:
                shards.write(work, found, group)
            if is_main:
                place = path if group is None else work
                write_state(place / STATE, step, state | {"shards": file_sha256(place / shards.METADATA)})
                if group is not None:
                    work.rename(path)
                remove_old(path.parent, keep)
    finally:
        if is_main:
            shutil.rmtree(work, ignore_errors=True)
    return path


def remove_old(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, each at once."""
    for old in list_resume(folder)[:-keep]:
        if old.is_dir():
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
        else:
            old.unlink()


@dataclass
class Saver:
    """Writes the checkpoints of a run into `folder` while it goes on (`beside`): a copy, in a thread, one at a time.

    An error of the thread is raised by the next call: in the process that had it as it was, in the others of the run as
    a `UserError` that says the same.
    """

    folder: Path
    keep: int
    world: World
    beside: bool = True
    written: Future[Path] | None = None
    group: Any = None
    """In which the threads talk, made when there are shards to save."""

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Begins to write what may change as soon as this returns; waits for the one before, and for this one where
        nothing is written `beside` the run. All processes at once."""
        self.finish()
        self.begin(step, payload)
        if not self.beside:
            self.finish()

    def begin(self, step: int, payload: dict[str, Any]) -> None:
        """Copies what is to be saved, and has it written."""
        write: Callable[[dict[str, Any]], Path]
        if shards.parted(payload)[1]:
            path = self.folder / f"step_{step:08d}"
            known = from_main(path.is_dir(), self.world)
            self.group = self.group or shards.own_group(patience())
            write = partial(
                save_shards, path, step, keep=self.keep, group=None if known else self.group, is_main=self.world.is_main
            )
        elif self.world.is_main:
            write = partial(save_resume, self.folder, step, keep=self.keep)
        else:
            return
        thread = ThreadPoolExecutor(1, "checkpoint")
        self.written = thread.submit(write, map_tensors(shards.copied, payload))
        thread.shutdown(wait=False)  # it ends when that is written

    def check(self) -> None:
        """Raises what the thread has raised, where the process is alone; several wait for one another in `finish`."""
        if self.world.size == 1 and self.written is not None and self.written.done():
            self.finish()

    def finish(self) -> None:
        """Waits until all is written. All processes at once."""
        written, self.written = self.written, None
        error = written.exception() if written else None
        elsewhere = from_main(error and one_line(error), self.world)
        if error:
            raise error
        if elsewhere:
            raise UserError(elsewhere)

    def wait(self) -> None:
        """Waits until nothing is being written, for what asks no other process."""
        wait([self.written] if self.written else [])

    def __enter__(self) -> None:
        """Nothing is being written any more when the block is left, however that is."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.wait()


def list_resume(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if STEP_FILE.fullmatch(path.name))


def load_resume(path: Path, place: shards.Place = lambda name: None) -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it; `UserError` when damaged or of another version.

    Of what is in shards this process reads its own, as it holds the tensors of `place`, by default the whole.
    """
    file = path / STATE if path.is_dir() else path
    with reading(file, "a resume file", RESUME_REMEDY):
        if not zipfile.is_zipfile(file):  # anything else PyTorch takes for its old format
            raise UserError(f"{file}: damaged or cut short; {RESUME_REMEDY}")
        check_archive(file)
        payload = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file}: not a resume file of this version of consonar")
    named, step = STEP_FILE.fullmatch(path.name), payload.get("step")
    if type(step) is not int or (named and step != int(named[1])):
        raise UserError(f"{path}: holds step {str(step)[:60]!r}, its name says another; {RESUME_REMEDY}")
    if path.is_dir():
        with reading(path, "a checkpoint in shards", RESUME_REMEDY):
            if payload.pop("shards", None) != file_sha256(path / shards.METADATA):
                raise ValueError(f"the checksum of {shards.METADATA} is another")
            payload = shards.read(path, payload, place)
    return payload


@dataclass
class State:
    """What moves during training; all but `interrupted` is in a resume checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None = None
    step: int = 0
    stopped: str | None = None
    """Why the objective ended training early."""
    interrupted: bool = False
    """Whether training ended early, after a checkpoint, because it was asked to."""

    def payload(self) -> dict[str, Any]:
        states = {"model": moving(self.model), "optimizer": self.optimizer.state_dict()}
        return states | {"average": self.average, "stopped": self.stopped}

    def place(self, name: str) -> Tensor | None:
        """The weight of what a checkpoint calls `name`, which may be its average or a moment of it."""
        part, _, key = name.partition("/")
        if part == "optimizer":
            return self.weights()[int(key.split("/")[1])]  # state/0/exp_avg
        return self.model.state_dict().get(key)

    def weights(self) -> list[Tensor]:
        """As the optimizer numbers them."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def restore(self, payload: dict[str, Any], where: str) -> None:
        """Goes on from what `load_resume` read; `UserError` for a part that is missing or something else."""
        parts = ("model", "optimizer") if self.average is None else ("model", "optimizer", "average")
        own = moving(self.model)
        for part in parts:
            if not isinstance(payload.get(part), dict):
                raise UserError(f"{where}: holds no {part}; {RESUME_REMEDY}")
            if part != "optimizer":
                check_weights(own, payload[part], where)
                here = {key: parallel.local(value) for key, value in payload[part].items()}
                check_plain(here, where)
                check_finite(here, where)
        given = {key: parallel.like(own[key], value) for key, value in payload["model"].items()}
        self.model.load_state_dict(given, strict=False)  # those of `own`
        with reading(where, "a resume file", RESUME_REMEDY):
            self.optimizer.load_state_dict(self.in_shards(payload["optimizer"]))
        if self.average is not None:
            device = device_of(self.model)
            self.average = {k: parallel.like(own[k], value.to(device)) for k, value in payload["average"].items()}
        stopped = payload.get("stopped")
        self.step, self.stopped = payload["step"], stopped if isinstance(stopped, str) else None

    def in_shards(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, with what is of a weight in shards in such."""
        weights = self.weights()
        entries = {
            index: {key: parallel.like(weights[index], value) for key, value in entry.items()}
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": entries}

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The whole model in evaluation mode, without gradient, with the moving average of the weights where there is
        one and adapters `merged`; then undone. All processes at once."""
        model, average = self.model, self.average
        if parallel.is_sharded(model):
            with torch.no_grad(), parallel.whole(model, average) as copied:  # beside it others run in shards
                yield merged(copied.eval())
            return
        with torch.inference_mode():
            own = {} if average is None else {key: value.clone() for key, value in moving(model).items()}
            try:
                model.eval()
                if average is not None:
                    model.load_state_dict(average, strict=False)
                yield merged(model)
            finally:
                if average is not None:
                    model.load_state_dict(own, strict=False)
                torch.clear_autocast_cache()  # older PyTorch keeps there what it cast of the average
                model.train()
