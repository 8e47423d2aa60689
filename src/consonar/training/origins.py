"""What a run was made of, in its origin.json: it is resumed on the same content, wherever that lies by then."""

from __future__ import annotations

from pathlib import Path

from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.origin import MEANING, PARTS, Origin, check

FILE = "origin.json"
PLACES = {
    "tokenizer": "tokenizer_fingerprint",
    "init": "init_sha256",
    "data.tokens": "data_sha256",
    "data.images": "data_sha256",
    "data.validation_tokens": "validation_sha256",
}
"""Options that say where a thing lies, and the hash that says what it is."""


def read_run_origin(run: Path) -> Origin:
    """What the run in this folder was made of; nothing is known of one that an older version made."""
    path = run / FILE
    if not path.exists():
        return Origin()
    return from_dict(read_json(path, "remove it to compare places instead of content"), str(path), Origin)


def write_run_origin(run: Path, origin: Origin) -> None:
    """Beside the configuration."""
    write_json(run / FILE, to_dict(origin))


def without_places(config: Json, run: Path) -> Json:
    """A run's configuration without the places of what its origin.json knows by content."""
    origin = read_run_origin(run)
    known = {key for key, name in PLACES.items() if getattr(origin, name) is not None}
    kept = {key: value for key, value in config.items() if key not in known}
    if isinstance(data := config.get("data"), dict):
        kept["data"] = {key: value for key, value in data.items() if f"data.{key}" not in known}
    return kept


def check_same_origin(run: Path, now: Origin) -> None:
    """Raises `UserError` unless what a run is resumed on has the content that it was started on."""
    before = read_run_origin(run)
    remedy = "give what the run was started on (it may have moved), or start another run"
    check("--resume", now, before, f"the start of {run}", remedy, parts=(*MEANING, "data", "validation", "init"))
    for what, _, name in PARTS.values():
        if getattr(before, name) is not None and getattr(now, name) is None:
            raise UserError(f"--resume: the {what} cannot be compared with that at the start of {run}; {remedy}")
