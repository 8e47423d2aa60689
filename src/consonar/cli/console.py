"""What commands print."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from consonar.errors import printable


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[..., None]]:
    """A progress callback (done, total): a bar on a terminal, silence elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def say(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), flush=True)
