"""The command `demo`."""

from dataclasses import dataclass
from pathlib import Path

from consonar.cli import say
from consonar.demo.job import run_demo


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = Path("runs/demo")
    """Folder to make; the page is OUT/report.html."""
    minutes: float = 18.0
    """How long the whole may take on this machine, which is measured first; more is better pictures."""
    seed: int = 0
    """Of all runs."""


def command(options: Options) -> None:
    page = run_demo(options.out, minutes=options.minutes, seed=options.seed, say=say)
    say(f"the page: {page.resolve()}")
