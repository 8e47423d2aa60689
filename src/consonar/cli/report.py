"""The command `report`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from consonar.cli import say
from consonar.report import write_report


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """One to eight run folders."""
    out: Path
    """The page to write."""
    title: str | None = None
    """Its title."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a page that is there."""


def command(options: Options) -> None:
    page = write_report(list(options.runs), options.out, title=options.title, overwrite=options.overwrite)
    say(f"report: {page}")
