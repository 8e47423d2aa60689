"""Where numbers go: metrics.jsonl always; TensorBoard, W&B or trackio when asked for; a line or a bar for people."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from consonar.config_io import to_dict
from consonar.errors import UserError, check_choice, reading
from consonar.files.readers import parse_json
from consonar.files.writers import write_atomically
from consonar.json_types import Json
from consonar.training.config import TrainConfig

EVERY = 20.0
"""Seconds between two lines about one thing."""


@dataclass(frozen=True)
class Sink:
    """What takes copies of the metrics."""

    log: Callable[[int, dict[str, float]], object]
    close: Callable[[], object]


def tensorboard(folder: Path, config: Json) -> Sink:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", json.dumps(config, indent=1))

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Sink(log, writer.close)


def run_of(package: str, folder: Path, config: Json) -> Sink:
    """W&B and trackio have the same interface."""
    module = import_module(package)
    module.init(project="consonar", name=folder.name, config=config)
    return Sink(lambda step, values: module.log(values, step=step), module.finish)


SINKS: dict[str, Callable[[Path, Json], Sink]] = {
    "tensorboard": tensorboard,
    "wandb": partial(run_of, "wandb"),
    "trackio": partial(run_of, "trackio"),
}
"""By the name of the package that each needs."""


def show(console: Console, text: str) -> None:
    """A line for people. A terminal that has gone, a closed pipe or a full log costs no step: nothing more is shown."""
    try:
        console.print(text, soft_wrap=True)
    except (OSError, UnicodeEncodeError, SystemExit):  # what rich does about a closed pipe is to end the process
        console.quiet = True


def how_far(what: str, *, quiet: bool) -> Callable[[int, int], None]:
    """A progress callback (done, total) that shows a line at first and every `EVERY` seconds, unless it is quiet."""
    console, said = Console(quiet=quiet, highlight=False, markup=False), -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            show(console, f"{what}: {done:,} of {total:,} are read")

    return progress


def check_sinks(names: tuple[str, ...]) -> None:
    """`UserError` for a sink that is unknown, not installed, or given twice; called before a run folder is made."""
    if twice := [name for name in SINKS if names.count(name) > 1]:
        raise UserError(f"loop.trackers: {twice[0]!r} is given twice; keep one")
    for name in names:
        check_choice("loop.trackers", name, SINKS)
        if find_spec(name) is None:
            raise UserError(f"loop.trackers: {name!r} needs the package of that name; install with: pip install {name}")


def read_metrics_line(text: str, where: str) -> Json:
    """One line of a metrics.jsonl: an object with an integer step and finite numbers or null."""
    with reading(where, "valid JSON", "remove the line if writing was cut off"):
        line = parse_json(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        raise UserError(f"{where}: {text[:60]!r} is not an object with an integer 'step'")
    for key, value in line.items():
        if value is not None and not (isinstance(value, (int, float)) and abs(value) < math.inf):
            raise UserError(f"{where}: {key} is {str(value)[:60]!r}, expected a finite number or null")
    return line


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A cut last line is left out; `UserError` for a damaged one before it."""
    if not path.exists():
        return []
    with reading(path, "text"):
        lines = path.read_bytes().split(b"\n")
        if not lines[-1].endswith(b"}"):
            lines.pop()  # empty behind a line break; else cut short by a process that was killed, or by a full disk
        texts = [line.decode() for line in lines]
    return [read_metrics_line(text, f"{path} line {number}") for number, text in enumerate(texts, start=1)]


class Tracker:
    """Logs numbers of one run in `folder`; only rank 0 writes. `resume_step` cuts lines that a resumed run repeats."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        resume_step: int = 0,
        enabled: bool = True,
        quiet: bool = False,
        on_step: Callable[[int], None] | None = None,
    ):
        self.name, self.total_steps, self.enabled, self.on_step = config.recipe, config.loop.steps, enabled, on_step
        self.kept: list[dict[str, float]] = []
        self.console = Console(quiet=quiet or not enabled, highlight=False, markup=False)
        self.path = folder / "metrics.jsonl"
        self.started = time.monotonic()
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None
        if not enabled:
            return
        if resume_step:
            self.kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        self.started -= (self.kept[-1].get("time") or 0.0) if self.kept else 0.0
        text = "".join(json.dumps(record) + "\n" for record in self.kept)
        write_atomically(self.path, lambda partial: partial.write_text(text))  # a full disk must not cost the history
        self.sinks = [SINKS[name](folder, to_dict(config)) for name in config.loop.trackers]
        if self.console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"),
            )  # fmt: skip
            self.progress = Progress(*columns, console=self.console, transient=False)
            self.progress.start()
            fields: Json = {"total": self.total_steps, "completed": resume_step, "rate": "", "shown": ""}
            self.task = self.progress.add_task(self.name, **fields)

    def has(self, step: int, prefix: str) -> bool:
        """Whether the run had logged a value called `prefix`... at `step` before it was resumed; known on rank 0."""
        return any(line["step"] == step and any(key.startswith(prefix) for key in line) for line in self.kept)

    def advance(self, step: int) -> None:
        """Moves the bar, where output is a terminal, and tells `on_step`."""
        if self.enabled and self.on_step:
            self.on_step(step)
        if self.progress:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, values: dict[str, float], *, rate: float | None = None) -> None:
        """One line of metrics.jsonl. Values that are not finite are written as null, which JSON can hold."""
        if not self.enabled:
            return
        record: dict[str, float | None] = {"step": step, "time": round(time.monotonic() - self.started, 3)}
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for sink in self.sinks:
            sink.log(step, values)
        shown = "  ".join(f"{key.split('/')[-1]} {value:.4g}" for key, value in list(values.items())[:4])
        speed = f"{rate:.2f} steps/s" if rate else ""
        if self.progress:
            fields: Json = {"rate": speed} if speed else {}  # without one the bar keeps the last rate
            self.progress.update(self.task, completed=step, shown=shown, **fields)
        else:
            left = f"  {(self.total_steps - step) / rate / 60:.1f} min left" if rate else ""
            show(self.console, f"{self.name} {step}/{self.total_steps}  {shown}  {speed}{left}")

    def say(self, text: str) -> None:
        """A line about the run, unless it is quiet."""
        show(self.console, f"{self.name}: {text}")

    def warn(self, text: str) -> None:
        """A line on stderr that is not lost behind a bar."""
        if self.enabled:
            show(Console(stderr=True, highlight=False, markup=False), f"{self.name}: {text}")

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        for sink in self.sinks:
            sink.close()
