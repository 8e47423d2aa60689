"""The key lists of released models (tests/goldens/manifests). Keys and counts are compared in tests/parity."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "goldens" / "manifests"


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.json"))


def manifest(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in manifest(name)["state_dict"].items()}
