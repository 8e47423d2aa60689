"""Where numbers go: metrics.jsonl always; TensorBoard, W&B or trackio when asked for; a line or a bar for people."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from consonar.errors import UserError, check_choice, reading
from consonar.files.readers import parse_json
from consonar.files.writers import write_atomically
from consonar.json_types import Json


class Sink(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink:
    def __init__(self, folder: Path, config: Json):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", json.dumps(config, indent=1))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class RunSink:
    """W&B and trackio have the same interface."""

    def __init__(self, module_name: str, folder: Path, config: Json):
        self.module = import_module(module_name)
        self.module.init(project="consonar", name=folder.name, config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


SINKS: dict[str, Callable[[Path, Json], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": partial(RunSink, "wandb"),
    "trackio": partial(RunSink, "trackio"),
}
"""By the name of the package that each needs."""


def show(console: Console, text: str) -> None:
    """A line for people. A terminal that has gone, a closed pipe or a full log costs no step: nothing more is shown."""
    try:
        console.print(text, soft_wrap=True)
    except (OSError, UnicodeEncodeError, SystemExit):  # what rich does about a closed pipe is to end the process
        console.quiet = True


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


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, those with step <= `last_step` only when given; a cut last line is left out.

    Raises `UserError` for a line before the last one that is damaged.
    """
    records: list[dict[str, float]] = []
    if not path.exists():
        return records
    with reading(path, "text"):
        lines = path.read_bytes().split(b"\n")
    if not lines[-1].endswith(b"}"):
        lines.pop()  # empty behind a line break; else cut short by a process that was killed, or by a full disk
    for number, line in enumerate(lines, start=1):
        with reading(path, "text"):
            text = line.decode()
        record = read_metrics_line(text, f"{path} line {number}")
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


class Tracker:
    """Logs numbers of one run in `folder`; only rank 0 writes. `resume_step` cuts lines that a resumed run repeats."""

    def __init__(
        self,
        folder: Path,
        config: Json,
        *,
        total_steps: int,
        resume_step: int = 0,
        sinks: tuple[str, ...] = (),
        enabled: bool = True,
        quiet: bool = False,
        description: str = "train",
        on_step: Callable[[int], None] | None = None,
    ):
        self.enabled = enabled
        self.kept: list[dict[str, float]] = []
        self.console = Console(quiet=quiet or not enabled, highlight=False, markup=False)
        self.path = folder / "metrics.jsonl"
        self.started = time.monotonic()
        self.description, self.total_steps, self.on_step = description, total_steps, on_step
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None
        if not enabled:
            return
        self.kept = read_metrics(self.path, last_step=resume_step) if resume_step else []
        self.started -= (self.kept[-1].get("time") or 0.0) if self.kept else 0.0
        text = "".join(json.dumps(record) + "\n" for record in self.kept)
        write_atomically(self.path, lambda partial: partial.write_text(text))  # a full disk must not cost the history
        check_sinks(sinks)
        self.sinks = [SINKS[name](folder, config) for name in sinks]
        if self.console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"),
            )  # fmt: skip
            self.progress = Progress(*columns, console=self.console, transient=False)
            self.progress.start()
            self.task = self.progress.add_task(description, total=total_steps, completed=resume_step, rate="", shown="")

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
            show(self.console, f"{self.description} {step}/{self.total_steps}  {shown}  {speed}{left}")

    def say(self, text: str) -> None:
        """A line about the run, unless it is quiet."""
        show(self.console, f"{self.description}: {text}")

    def warn(self, text: str) -> None:
        """A line on stderr that is not lost behind a bar."""
        if self.enabled:
            show(Console(stderr=True, highlight=False, markup=False), f"{self.description}: {text}")

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        for sink in self.sinks:
            sink.close()
