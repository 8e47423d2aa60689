"""Weights of networks that judge images: one published file each, brought by the user, hash checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from consonar.errors import UserError, reading
from consonar.files.cache import cache_dir
from consonar.files.readers import home_expanded
from consonar.files.weights import check_plain
from consonar.files.writers import file_sha256


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights."""

    network: str
    """What it is for; begins every message."""
    name: str
    url: str
    sha256_prefix: str
    """By PyTorch's convention part of the name: the first eight hex digits of the SHA-256."""

    def read(self, path: str | Path | None, *, check_hash: bool) -> tuple[Path, str, dict[str, Tensor]]:
        """The file, its SHA-256 and its tensors; `path` None: `name` in `cache_dir()`. Never downloads.

        A .pth or .safetensors state dict; nothing in the file is executed. Raises `UserError` when it is missing,
        damaged, holds something else, or (with `check_hash`) has another SHA-256.
        """
        file = home_expanded(path) if path is not None else cache_dir() / self.name
        if not file.is_file():
            raise UserError(
                f"{self.network}: no weights at {file}; download {self.url} (SHA-256 {self.sha256_prefix}...) and put "
                "it there" + ("" if path is None else ", or name the file you have")
            )
        digest = file_sha256(file)
        if check_hash and not digest.startswith(self.sha256_prefix):
            raise UserError(
                f"{self.network}: {file} has SHA-256 {digest[:8]}..., the published {self.name} "
                f"{self.sha256_prefix}...: cut short or another file; download {self.url} again"
            )
        return file, digest, self._tensors(file)

    def _tensors(self, file: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        with reading(f"{self.network}: {file}", "a file of weights"):
            if file.suffix == ".safetensors":
                return load_file(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise UserError(
                f"{self.network}: {file}: holds a {type(state).__name__}, expected a table of weights by name"
            )
        tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        check_plain(tensors, f"{self.network}: {file}")
        return tensors
