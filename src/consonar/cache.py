"""Where consonar keeps what it can rebuild: rendered data sets, reference features, converted weights."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$CONSONAR_CACHE`, or `consonar` below `$XDG_CACHE_HOME` or `~/.cache`; created when missing."""
    root = os.environ.get("CONSONAR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) if root else Path(base) / "consonar"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
