"""Resume files: `checkpoints/step_00001000.pt` holds everything a run needs to go on exactly.

That is the trainee with its heads, the optimizer and the moving average. The last `keep` files are kept.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from consonar.errors import UserError, reading
from consonar.files.writers import write_atomically

FORMAT_VERSION = 1
RESUME_REMEDY = "remove it to resume from the one before"
STEP_FILE = re.compile(r"step_(\d{8})\.pt")


def save_resume(folder: Path, step: int, payload: Mapping[str, Any], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX.pt` and removes all but the last `keep` of them."""
    path = folder / f"step_{step:08d}.pt"
    write_atomically(
        path, lambda partial: torch.save({"format_version": FORMAT_VERSION, "step": step, **payload}, partial)
    )
    for old in list_resume(folder)[:-keep]:
        old.unlink()
    return path


def list_resume(folder: Path) -> list[Path]:
    """Resume files, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if STEP_FILE.fullmatch(path.name))


def load_resume(path: Path) -> dict[str, Any]:
    """Reads a resume file without executing anything in it; `UserError` when damaged or of another version."""
    with reading(path, "a resume file", RESUME_REMEDY):
        if not zipfile.is_zipfile(path):  # anything else PyTorch takes for its old format
            raise UserError(f"{path}: damaged or cut short; {RESUME_REMEDY}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a resume file of this version of consonar")
    named, step = STEP_FILE.fullmatch(path.name), payload.get("step")
    if type(step) is not int or (named and step != int(named[1])):
        raise UserError(f"{path}: holds step {str(step)[:60]!r}, its name says another; {RESUME_REMEDY}")
    return payload
