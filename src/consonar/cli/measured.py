"""What `evaluate` shows: metrics with their protocol, and what came of `--check`."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consonar.cli import say
from consonar.components import read_component_kind
from consonar.data.bad_images import BadImages
from consonar.distributed import World
from consonar.errors import UserError
from consonar.evaluation.compared import Check
from consonar.evaluation.results import Measurement
from consonar.model_folders import SHIPPED

WEIGHTS, LINES = "model.safetensors", "metrics.jsonl"
"""Files of a model folder and of a run."""


def holds(place: Path, name: str) -> bool:
    """Whether a folder has this file beside a configuration."""
    return (place / "config.json").is_file() and (place / name).is_file()


def is_tokenizer(place: Path) -> bool:
    """Whether this is the folder of a tokenizer, of a run or of a model."""
    return (holds(place, WEIGHTS) or holds(place, LINES)) and read_component_kind(place) == "tokenizer"


def keeps_results(place: Path, asked: str) -> bool:
    """Whether this is the folder of a run. `UserError` for a generator that is none, which `asked` says how to
    sample."""
    is_model, is_run = holds(place, WEIGHTS), holds(place, LINES)
    if (is_model and not is_run) or (not place.exists() and str(place) in SHIPPED["generator"]):
        kind = "the model of a generator" if is_model else "a shipped generator"
        raise UserError(
            f"evaluate: {place} is {kind}, which keeps no results; first consonar sample {place} {asked} --out "
            f"{place.name}.npz, then evaluate that file"
        )
    return is_run


def say_about(protocol: str, unavailable: Mapping[str, str], remarks: Iterable[str]) -> None:
    for line in (protocol, *(f"{name}: not measured ({why})" for name, why in unavailable.items()), *remarks):
        say(line)


def print_metrics(metrics: Mapping[str, Measurement], title: str) -> None:
    extra = ["spread", *(["error"] if any(found.error is not None for found in metrics.values()) else [])]
    table = Table("metric", "value", *extra, title=title, title_justify="left")
    for name, found in metrics.items():
        numbers = [getattr(found, column) for column in extra]
        table.add_row(name, f"{found.value:.4g}", *("" if one is None else f"{one:.2g}" for one in numbers))
    Console(highlight=False).print(table)


def show_check(found: Check, title: str) -> None:
    """Every number then and now, what differs, and the verdict."""
    table = Table("metric", "then", "now", "off by", "allowed", "", title=title, title_justify="left")
    for one in found.numbers:
        now, off = ("", "") if one.now is None else (f"{one.now:.6g}", f"{one.now - one.before:.2g}")
        table.add_row(one.name, f"{one.before:.6g}", now, off, f"{one.allowed:.2g}", "" if one.holds else "differs")
    Console(highlight=False).print(table)
    for line in found.differs:
        say(f"differs: {line}")
    say(found.verdict)


def beside(out: Path | None) -> Path | None:
    """The list of bad images that belongs to a file of results."""
    return out and out.with_name(f"{out.name}-bad-images.txt")


def say_bad(bad: BadImages, world: World) -> None:
    if bad.note and world.is_main:
        say(bad.note)
        bad.write()
