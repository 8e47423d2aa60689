"""What `evaluate` shows: metrics with their protocol, and what came of `--check`."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consonar.cli import say
from consonar.data.bad_images import BadImages
from consonar.distributed import World
from consonar.evaluation.compared import Check
from consonar.evaluation.results import Measurement


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
