"""Where consonar keeps what it can rebuild: rendered data sets, reference features, converted weights."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from consonar.errors import UserError, printable
from consonar.files.readers import home_expanded
from consonar.files.writers import write_atomically


def cache_dir() -> Path:
    """`$CONSONAR_CACHE`, or `consonar` below `$XDG_CACHE_HOME` or `~/.cache`; made by whoever writes into it.

    Raises `UserError` where no home folder is known.
    """
    if root := os.environ.get("CONSONAR_CACHE"):
        return home_expanded(root)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "consonar"
    try:
        return Path.home() / ".cache" / "consonar"
    except RuntimeError as error:
        raise UserError("cache folder: this user has no home folder; set CONSONAR_CACHE to a folder") from error


def keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """What `write` writes into a file, atomically into the cache folder.

    It only saves time: failing costs a line on stderr, not the work.
    """

    def opened(partial: Path) -> None:
        with partial.open("wb") as file:
            write(file)

    try:
        write_atomically(path, opened)
    except (OSError, UserError) as error:
        reason = f"{error.filename or path}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"consonar: not kept in the cache folder: {printable(reason)}", file=sys.stderr)
