"""What commands print."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from consonar.errors import printable

if TYPE_CHECKING:
    from consonar.published import Published


def print_metrics(metrics: dict[str, dict[str, float | None]], title: str) -> None:
    from rich.table import Table

    table = Table("metric", "value", "spread", title=title, title_justify="left")
    for name, entry in metrics.items():
        spread = entry["spread"]
        table.add_row(name, f"{entry['value']:.4g}", "" if spread is None else f"{spread:.2g}")
    Console(highlight=False).print(table)


def print_models(title: str, models: Sequence[Published]) -> None:
    """A table of released models; narrow terminals fold the place of publication."""
    from rich.table import Table

    # Plain lines: what is piped into a file or a mail stays legible.
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for heading, side in {
        "name": "left", "kind": "left", "params": "right", "tokens": "right", "codes": "right", "licence": "left",
        "parity": "left",
    }.items():  # fmt: skip
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("published at", overflow="fold")
    for model in models:
        codes = str(model.vocab_size) + (f"x{model.code_dim}" if model.code_dim else "")
        millions = f"{model.parameters / 1e6:,.0f}M"
        place = f"{model.repository}/{model.file}" if model.repository else str(model.elsewhere)
        table.add_row(
            model.name, model.kind, millions, str(model.num_tokens), codes, model.licence, model.parity, place
        )
    console = Console(highlight=False)
    Console(highlight=False, width=console.width if console.is_terminal else 200).print(table)
    say("")


@contextlib.contextmanager
def counting(what: str) -> Any:
    """A progress callback (done, total): a bar on a terminal, silence elsewhere."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def say(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), flush=True)
