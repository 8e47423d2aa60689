"""What moves during training, resume files, `checkpoints/step_00001000.pt`, which hold all of it, and the best model.

What moves is the trainee with its heads, the optimizer and the moving average: a run goes on exactly.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consonar import parallel
from consonar.components import save_generator
from consonar.data.loader import ImageBatches
from consonar.distributed import World, from_main
from consonar.errors import UserError, one_line, reading
from consonar.files.readers import check_archive, read_json
from consonar.files.weights import check_finite, check_plain, check_weights
from consonar.files.writers import write_atomically, write_json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.records import device_of, map_tensors
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.types import Condition, Generator, Tokenizer

FORMAT_VERSION = 1
RESUME_REMEDY = "remove it to resume from the one before"
STEP_FILE = re.compile(r"step_(\d{8})\.pt")
NETWORK = "efficientnet-lite0"
METRIC = f"FD({NETWORK}) validation"


def save_resume(folder: Path, step: int, payload: Mapping[str, object], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX.pt`, reads it back, and removes all but the last `keep` of them.

    It has its name, and takes the place of another, once what was read back has the checksums of what was written.
    """
    path = folder / f"step_{step:08d}.pt"

    def write(partial: Path) -> None:
        torch.save({"format_version": FORMAT_VERSION, "step": step, **payload}, partial)
        with reading(path, "what was written when it is read back", "it is not kept, the one before it is"):
            check_archive(partial)

    write_atomically(path, write)
    for old in list_resume(folder)[:-keep]:
        old.unlink()
    return path


@dataclass
class Saver:
    """Writes the checkpoints of a run into `folder` while it goes on: a copy, in a thread, one at a time.

    An error of the thread is raised by the next call: in the process that had it as it was, in the others of the run as
    a `UserError` that says the same.
    """

    folder: Path
    keep: int
    world: World
    written: Future[Path] | None = None

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Begins to write what may change as soon as this returns; waits for the one before. All processes at once."""
        self.finish()
        if self.world.is_main:
            copy = map_tensors(lambda tensor: torch.empty_like(tensor, device="cpu").copy_(tensor), payload)
            thread = ThreadPoolExecutor(1, "checkpoint")
            self.written = thread.submit(save_resume, self.folder, step, copy, self.keep)
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
    """Resume files, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if STEP_FILE.fullmatch(path.name))


def load_resume(path: Path) -> dict[str, Any]:
    """Reads a resume file without executing anything in it; `UserError` when damaged or of another version."""
    with reading(path, "a resume file", RESUME_REMEDY):
        if not zipfile.is_zipfile(path):  # anything else PyTorch takes for its old format
            raise UserError(f"{path}: damaged or cut short; {RESUME_REMEDY}")
        check_archive(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a resume file of this version of consonar")
    named, step = STEP_FILE.fullmatch(path.name), payload.get("step")
    if type(step) is not int or (named and step != int(named[1])):
        raise UserError(f"{path}: holds step {str(step)[:60]!r}, its name says another; {RESUME_REMEDY}")
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

    def payload(self, keep: bool = True) -> dict[str, object]:
        """What `restore` takes, the same however the model is held: of a sharded one all processes gather it at once,
        for those that `keep` it."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        return {**{key: parallel.gathered(value, keep) for key, value in states.items()}, "stopped": self.stopped}

    def restore(self, payload: dict[str, Any], where: str) -> None:
        """Goes on from what `load_resume` read; `UserError` for a part that is missing or something else."""
        parts = ("model", "optimizer") if self.average is None else ("model", "optimizer", "average")
        for part in parts:
            if not isinstance(payload.get(part), dict):
                raise UserError(f"{where}: holds no {part}; {RESUME_REMEDY}")
            if part != "optimizer":
                check_weights(self.model.state_dict(), payload[part], where)
                check_plain(payload[part], where)
        own = self.model.state_dict()
        check_finite(payload["model"], where)
        self.model.load_state_dict({key: parallel.like(own[key], value) for key, value in payload["model"].items()})
        with reading(where, "a resume file", RESUME_REMEDY):
            self.optimizer.load_state_dict(self.in_shards(payload["optimizer"]))
        if self.average is not None:
            device = device_of(self.model)
            self.average = {k: parallel.like(own[k], value.to(device)) for k, value in payload["average"].items()}
        stopped = payload.get("stopped")
        self.step, self.stopped = payload["step"], stopped if isinstance(stopped, str) else None

    def in_shards(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, with what is of a weight in shards in such."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        entries = {
            index: {key: parallel.like(weights[index], value) for key, value in entry.items()}
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": entries}

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The whole model in evaluation mode, without gradient, with the moving average of the weights where there is
        one; then undone. All processes at once."""
        model, average = self.model, self.average
        if parallel.is_sharded(model):
            with torch.no_grad(), parallel.whole(model, average) as copied:  # beside it others run in shards
                yield copied.eval()
            return
        with torch.inference_mode():
            own = {} if average is None else {key: value.clone() for key, value in model.state_dict().items()}
            try:
                model.eval()
                if average is not None:
                    model.load_state_dict(average)
                yield model
            finally:
                if average is not None:
                    model.load_state_dict(own)
                model.train()


@dataclass
class KeepBest:
    """Keeps the state of a generator whose samples have the lowest Fréchet distance so far to the validation images.

    It is in best/ of the run `folder`, step and value in best.json. `num_samples` are drawn at temperature 1, of the
    same seeds at every step.
    """

    validation: ImageBatches
    tokenizer: Tokenizer
    num_samples: int
    folder: Path
    origin: Origin

    def __post_init__(self) -> None:
        self.network = load_feature_network(NETWORK, str(device_of(self.tokenizer)))
        self.batch_size = self.validation.batch_size
        self.target = self.moments(batch.images for batch in self.validation.ordered(self.batch_size))
        if self.target.count < 2:
            raise UserError("loop.fd_samples: a distance needs 2 validation images or more, there is 1; set it to 0")

    def moments(self, batches: Iterable[Tensor]) -> Moments:
        moments = Moments(self.network.num_features)
        for images in batches:
            moments.update(self.network(images))
        return moments

    def distance(self, model: Generator) -> float:
        """That of the samples of the generator."""
        condition: Condition = balanced_labels(self.num_samples, max(1, model.num_classes))
        if self.validation.captions is not None:
            condition = self.validation.captions.spread(self.num_samples)
        images = sample(model, self.tokenizer, condition, batch_size=self.batch_size, precision="fp32").images
        found = self.moments(images.split(self.batch_size))
        return frechet_distance(found.mean, found.cov, self.target.mean, self.target.cov)

    def keep(self, model: Generator, step: int, distance: float) -> None:
        """Keeps the generator, if it is the best so far."""
        record = self.folder / "best.json"
        # A record of a later step is left from before a resume: the run will come by there again.
        if record.exists():
            known = read_json(record)
            with reading(record, "the record of the best model", "remove it"):
                better = known["step"] < step and known["value"] <= distance
            if better:
                return
        save_generator(model, self.folder / "best", self.origin)
        write_json(record, {"step": step, "metric": METRIC, "value": distance})
