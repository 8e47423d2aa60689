"""Tokenizers by name or folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from consonar import checkpoint
from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError, unknown
from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.maskgit import MaskGITConfig, MaskGITTokenizer
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.tokenizers.vqgan_plus import VQGANPlusConfig, VQGANPlusTokenizer
from consonar.types import Tokenizer

PRETRAINED = Path(__file__).parent / "pretrained"
# Tokenizers whose weights are part of the package.
SHIPPED = ("openmoji-64", "openmoji-64-f4")
# Kinds whose weights serve any image size.
RESIZABLE = ("vq", "maskgit-vq", "vqgan-plus")


class TokenizerModule(Tokenizer, Protocol):
    """A tokenizer that is a module: what `load_tokenizer` returns."""

    config: Any
    """The frozen dataclass that it was made from; has `kind`."""

    @property
    def codebook(self) -> Tensor:
        """(V, C): the codes as the decoder receives them."""
        ...

    def to(self, device: Any) -> Self: ...

    def state_dict(self) -> dict[str, Tensor]: ...


TOKENIZERS: dict[str, tuple[type, Callable[..., Any]]] = {
    "vq": (VQConfig, VQTokenizer),
    "maskgit-vq": (MaskGITConfig, MaskGITTokenizer),
    "vqgan-plus": (VQGANPlusConfig, VQGANPlusTokenizer),
    "titok": (TiTokConfig, TiTokTokenizer),
    "alitok": (AliTokConfig, AliTokTokenizer),
}


def save_tokenizer(tokenizer: TokenizerModule, folder: Path, *, dtype: str = "float32") -> None:
    """Writes a component folder; `dtype` float16 halves the file (the fingerprint is that of the rounded weights)."""
    state = {key: value.to(getattr(torch, dtype)) for key, value in tokenizer.state_dict().items()}
    checkpoint.save_component(
        folder, {"component": "tokenizer", "name": tokenizer.name, **to_dict(tokenizer.config)}, state
    )


def resized(config: Any, num_tokens: int) -> Any:
    """The configuration for square images of `num_tokens` tokens, where the architecture takes any size.

    Convolutions do: LlamaGen's VQ serves its generators at 256, 384 and 512 px with the same weights. Others come back
    as they are, and so does one that no square image gives so many tokens.
    """
    side = math.isqrt(num_tokens)
    if config.kind not in RESIZABLE or side * side != num_tokens:
        return config
    return replace(config, image_size=side * 2 ** (len(config.channel_multipliers) - 1))


def load_tokenizer(name_or_path: str | Path, *, num_tokens: int | None = None) -> TokenizerModule:
    """A frozen tokenizer in evaluation mode on the CPU, from a name (`SHIPPED`), a run or a component folder.

    `num_tokens`: for images of so many tokens, where its architecture takes any image size (see `resized`).

    `hf:` and the name of a published model, or owner/repository/file, is a released file (`consonar.convert.hub`).
    Raises `UserError` for an unknown name, a missing or damaged folder, or weights of another shape.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in SHIPPED:  # a `Path` is a folder
        path = PRETRAINED / str(name_or_path)
    elif str(name_or_path).startswith("hf:"):
        from consonar.convert.hub import fetch_component

        path = fetch_component(str(name_or_path), "tokenizer")
    elif not str(name_or_path) or not path.is_dir():
        raise unknown("tokenizer", str(name_or_path), [*SHIPPED, "a folder with config.json and model.safetensors"])
    else:
        path = checkpoint.released(path, "tokenizer")
    config = checkpoint.read_config(path)
    if config.pop("component", None) != "tokenizer":
        raise UserError(f"{path}: not a tokenizer folder (component in config.json)")
    name = config.pop("name", path.name)
    if not isinstance(name, str) or not name:
        raise UserError(f"{path / 'config.json'}: name is {name!r}, expected a text")
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise unknown(f"{path}: kind", kind, TOKENIZERS)
    config_class, tokenizer_class = TOKENIZERS[kind]
    settings = from_dict(config, str(path / "config.json"), config_class)
    if num_tokens is not None:
        settings = resized(settings, num_tokens)
    return checkpoint.load_module(lambda: tokenizer_class(settings, name=name), path)
