"""Model folders: a trained generator or tokenizer as `config.json` + `model.safetensors`, written and read.

What a name or an `hf:` text means is said one floor above, in `consonar.components`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from consonar.config_io import from_dict, to_dict
from consonar.cpu.kernels import tune
from consonar.errors import UserError, unknown
from consonar.files.component import component_config, load_module, released, save_component
from consonar.generators import GENERATORS
from consonar.origin import Origin, check_distinct
from consonar.tokenizers import TOKENIZERS, TokenizerModule, resized
from consonar.types import Generator, Weights

SHIPPED_GENERATORS = ("openmoji",)
"""Generators whose weights are part of the package."""
SHIPPED_TOKENIZERS = ("openmoji-64", "openmoji-64-f4")
"""Tokenizers whose weights are part of the package."""
PACKAGE = Path(__file__).parent


def save_generator(generator: Generator, folder: Path, origin: Origin, *, dtype: str = "float32") -> None:
    """Writes a model folder: the generator's shape, its origin and its weights; `dtype` float16 halves the file."""
    config = {"component": "generator", **to_dict(origin), **to_dict(generator.config)}
    save_component(folder, config, stored(generator, dtype))


def save_tokenizer(tokenizer: TokenizerModule, folder: Path, *, dtype: str = "float32") -> None:
    """Writes a model folder; `dtype` float16 halves the file (the fingerprint is that of the rounded weights)."""
    config = {"component": "tokenizer", "name": tokenizer.name, **to_dict(tokenizer.config)}
    save_component(folder, config, stored(tokenizer, dtype))


def stored(model: Weights, dtype: str) -> dict[str, torch.Tensor]:
    """The weights as they are written."""
    return {key: value.to(getattr(torch, dtype)) for key, value in model.state_dict().items()}


def shipped_or_folder(what: str, name: str | Path) -> Path:
    """The folder of a shipped model or of a run, or the path itself; `what` is `generator` or `tokenizer`.

    Raises `UserError` for a name that is neither shipped nor a folder, and for a run that has no model yet.
    """
    shipped = SHIPPED_GENERATORS if what == "generator" else SHIPPED_TOKENIZERS
    if isinstance(name, str) and name in shipped:  # a `Path` is a folder: `Path("./openmoji")` has lost its dot
        return PACKAGE / f"{what}s" / "pretrained" / name
    if not str(name) or not Path(name).is_dir():  # an empty name would be the working directory
        raise unknown(what, str(name), [*shipped, "a run folder", "a model folder", "hf:NAME"])
    return released(Path(name), what)


def read_settings(folder: Path, what: str, kinds: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """config.json without the shape, the shape as its dataclass, and the class of the model.

    Raises `UserError` for a folder of something else than `what`, and for a kind that is not in the table.
    """
    config = component_config(folder)
    if config.pop("component", None) != what:
        raise UserError(f"{folder}: not a {what} folder (component in config.json)")
    about = {key: config.pop(key) for key in ("name", *(field.name for field in fields(Origin))) if key in config}
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown(f"{folder}: kind", kind, kinds)
    return about, from_dict(config, str(folder / "config.json"), kinds[kind].config), kinds[kind].model


def read_generator(folder: Path) -> Generator:
    """The generator of a model folder, frozen, in evaluation mode, on the CPU; its `origin` says what made it.

    Raises `UserError` for a damaged folder, weights of another shape, and more names of classes than classes.
    """
    _, settings, generator_class = read_settings(folder, "generator", GENERATORS)
    generator: Generator = tune(load_module(lambda: generator_class(settings), folder))
    generator.origin = read_origin(folder)
    names, where = generator.origin.class_names or (), str(folder / "config.json")
    if len(names) > generator.num_classes:
        raise UserError(f"{where}: class_names are {len(names)} for {generator.num_classes} classes")
    check_distinct(names, where)
    return generator


def read_tokenizer(folder: Path, num_tokens: int | None = None) -> TokenizerModule:
    """The tokenizer of a model folder, frozen, in evaluation mode, on the CPU.

    `num_tokens`: for images of so many tokens, where its architecture takes any image size (see `tokenizers.resized`).
    """
    about, settings, tokenizer_class = read_settings(folder, "tokenizer", TOKENIZERS)
    name = about.get("name", folder.name)
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / 'config.json'}: name is {name!r}, expected a text")
    if num_tokens is not None:
        settings = resized(settings, num_tokens)
    tokenizer: TokenizerModule = load_module(lambda: tokenizer_class(settings, name=name), folder)
    return tokenizer


def read_origin(folder: Path) -> Origin:
    """The origin of the generator in a model folder; `UserError` for a folder that is none."""
    config = component_config(folder)
    if config.get("component") != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    values = {field.name: config[field.name] for field in fields(Origin) if field.name in config}
    return from_dict(values, str(folder / "config.json"), Origin)
