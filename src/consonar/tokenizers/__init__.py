"""Tokenizers by name or folder."""

from __future__ import annotations

from pathlib import Path

import torch

from consonar import checkpoint
from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError, unknown
from consonar.tokenizers.vq import VQConfig, VQTokenizer

PRETRAINED = Path(__file__).parent / "pretrained"
# Tokenizers whose weights are part of the package.
SHIPPED = ("openmoji-64",)
TOKENIZERS = {"vq": (VQConfig, VQTokenizer)}


def save_tokenizer(tokenizer: VQTokenizer, folder: Path, *, dtype: str = "float32") -> None:
    """Writes a component folder; `dtype` float16 halves the file (the fingerprint is that of the rounded weights)."""
    state = {key: value.to(getattr(torch, dtype)) for key, value in tokenizer.state_dict().items()}
    checkpoint.save_component(
        folder, {"component": "tokenizer", "name": tokenizer.name, **to_dict(tokenizer.config)}, state
    )


def load_tokenizer(name_or_path: str | Path) -> VQTokenizer:
    """A frozen tokenizer in evaluation mode on the CPU, from a name (`openmoji-64`), a run or a component folder.

    Raises `UserError` for an unknown name, a missing or damaged folder, or weights of another shape.
    """
    path = Path(name_or_path)
    if str(name_or_path) in SHIPPED:
        path = PRETRAINED / str(name_or_path)
    elif not path.is_dir():
        raise unknown("tokenizer", str(name_or_path), [*SHIPPED, "a folder with config.json and model.safetensors"])
    elif (path / "model").is_dir():
        path = path / "model"
    config, state = checkpoint.read_component(path)
    if config.pop("component", None) != "tokenizer":
        raise UserError(f"{path}: not a tokenizer folder (component in config.json)")
    name = config.pop("name", path.name)
    kind = config.get("kind")
    if kind not in TOKENIZERS:
        raise unknown(f"{path}: kind", kind, TOKENIZERS)
    config_class, tokenizer_class = TOKENIZERS[kind]
    tokenizer = tokenizer_class(from_dict(config, str(path / "config.json"), config_class), name=name)
    checkpoint.load_weights(tokenizer, state, str(path))
    return tokenizer.eval().requires_grad_(False)
