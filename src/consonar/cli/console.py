"""What commands print."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from consonar.errors import printable


def print_metrics(metrics: dict[str, dict[str, float | None]], title: str) -> None:
    table = Table("metric", "value", "spread", title=title, title_justify="left")
    for name, entry in metrics.items():
        spread = entry["spread"]
        table.add_row(name, f"{entry['value']:.4g}", "" if spread is None else f"{spread:.2g}")
    Console(highlight=False).print(table)


@contextlib.contextmanager
def counting(what: str) -> Any:
    """A progress callback (done, total): a bar on a terminal, silence elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def say(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), flush=True)
