"""Two formats with two jobs.

*Resume*: `checkpoints/step_00001000.pt`, everything a run needs to go on exactly (trainee with heads, optimizer, moving
average, random state), written under a temporary name and renamed, the last `keep` kept. *Release*: a component folder
`config.json` + `model.safetensors` (generator without heads, or tokenizer), which `load_generator` and
`load_tokenizer` read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from consonar.errors import UserError

FORMAT_VERSION = 1
STEP_FILE = re.compile(r"step_(\d{8})\.pt")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames; a failed write leaves what was there.

    Raises `UserError` when the disk is full, with what is free and that nothing was replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
            r"No space left|os error (28|27|122)|unexpected pos|PytorchStreamWriter|file write failed", str(error)
        )
        if full:
            raise UserError(f"{path}: the disk is full ({free / 1e6:.0f} MB free); nothing was replaced") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def component_fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a configuration and weights, the same whatever file or dtype they were stored in."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save_component(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes a component folder: what it is (config.json) and its weights (model.safetensors)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def save(path: Path) -> None:
        safetensors.torch.save_file(tensors, path)
        # safetensors makes its file for the owner alone: give it to those who may read the folder.
        path.chmod(folder.stat().st_mode & 0o666)

    write_atomically(folder / "model.safetensors", save)
    text = json.dumps({"format_version": FORMAT_VERSION, **config}, indent=1)
    write_atomically(folder / "config.json", lambda path: path.write_text(text + "\n"))


def read_component(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a component folder; `UserError` for a missing, damaged or newer one."""
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{folder}: no {path.name}; a model folder holds config.json and model.safetensors")
    try:
        config = json.loads(config_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config_path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{config_path}: holds a {type(config).__name__}, expected an object")
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{config_path}: format_version {version!r}; this consonar reads {FORMAT_VERSION}")
    try:
        return config, safetensors.torch.load_file(weights_path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{weights_path}: damaged or cut short ({error})") from error


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Loads exactly these weights; `UserError` lists what is missing, unknown or of another shape."""
    own = module.state_dict()
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"missing {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}")
    if extra := [key for key in state if key not in own]:
        problems.append(f"unknown {', '.join(extra[:4])}{' ...' if len(extra) > 4 else ''}")
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}")
    if problems:
        raise UserError(f"{where}: not the weights of this model: {'; '.join(problems[:4])}")
    module.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})


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
    import pickle
    import zipfile

    damaged = f"{path}: damaged or cut short; remove it to resume from the one before"
    if not zipfile.is_zipfile(path):  # anything else PyTorch takes for its old format, with errors of any kind
        raise UserError(damaged)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(damaged) from error
    if not isinstance(payload, dict) or payload.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a resume file of this version of consonar")
    return payload
