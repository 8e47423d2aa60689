"""Generators by name or folder."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from consonar import checkpoint
from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError, unknown
from consonar.generators.alitok import AliTokARConfig, AliTokARGenerator
from consonar.generators.janus import JanusConfig, JanusGenerator
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.origin import Origin, check, check_distinct
from consonar.tokenizers import TokenizerModule, load_tokenizer

PRETRAINED = Path(__file__).parent / "pretrained"
# Generators whose weights are part of the package.
SHIPPED = ("openmoji",)
# Kind to (class of its configuration, class of the generator, which follows `types.Generator`).
GENERATORS: dict[str, tuple[type[Any], type[Any]]] = {
    "rear": (ReARConfig, ReARGenerator),
    "llamagen": (LlamaGenConfig, LlamaGenGenerator),
    "alitok-ar": (AliTokARConfig, AliTokARGenerator),
    # Needs transformers, which is imported when one is built.
    "janus": (JanusConfig, JanusGenerator),
}


def build_generator(config: Any) -> Any:
    """A generator of this configuration, of whatever kind, with random weights."""
    return GENERATORS[config.kind][1](config)


def save_generator(generator: Any, folder: Path, origin: Origin, *, dtype: str = "float32") -> None:
    """Writes a component folder: the generator's shape, its origin and its weights; `dtype` float16 halves the file."""
    config = {"component": "generator", **to_dict(origin), **to_dict(generator.config)}
    state = {key: value.to(getattr(torch, dtype)) for key, value in generator.state_dict().items()}
    checkpoint.save_component(folder, config, state)


def has_name(generator: str) -> bool:
    """Whether this is a name (of a shipped generator, or `hf:`), which means the same in every working directory."""
    return generator in SHIPPED or generator.startswith("hf:")


def model_folder(path: str | Path) -> Path:
    """The component folder that is meant: the path, `model` inside a run folder, a shipped or an `hf:` generator's."""
    if isinstance(path, str) and path in SHIPPED:  # a `Path` is a folder: `Path("./openmoji")` has lost its dot
        return PRETRAINED / str(path)
    if str(path).startswith("hf:"):
        from consonar.convert.hub import fetch_component

        return fetch_component(str(path), "generator")
    name, path = str(path), Path(path)
    if not name or not path.is_dir():  # an empty name would be the working directory
        raise unknown("generator", name, [*SHIPPED, "a run folder", "a model folder", "hf:NAME"])
    return checkpoint.released(path, "generator")


def read_component_kind(path: str | Path) -> str:
    """What a run or component folder holds: `generator` or `tokenizer`."""
    config = checkpoint.read_config(model_folder(path))
    return str(config.get("component", ""))


def read_origin(path: str | Path) -> Origin:
    """The origin of a stored generator; `UserError` for a folder that is no generator or names no tokenizer."""
    folder = model_folder(path)
    config = checkpoint.read_config(folder)
    if config.get("component") != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    values = {f.name: config[f.name] for f in fields(Origin) if f.name in config}
    return from_dict(values, str(folder / "config.json"), Origin)


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of the file of a stored generator's weights."""
    return checkpoint.file_sha256(model_folder(path) / "model.safetensors")


def load_own_tokenizer(path: str | Path) -> TokenizerModule:
    """The tokenizer that a stored generator was trained with, frozen, on the CPU.

    Raises `UserError` when it is not there or its weights have changed since: other codes would decode to noise.
    """
    origin = read_origin(path)
    if origin.tokenizer is None:
        raise UserError(f"tokenizer: {path} does not say which it was trained with; name one, e.g. --tokenizer FOLDER")
    num_tokens = checkpoint.read_config(model_folder(path)).get("num_tokens")
    tokenizer = load_tokenizer(origin.tokenizer, num_tokens=num_tokens)
    here = Origin(tokenizer=origin.tokenizer, tokenizer_fingerprint=tokenizer.fingerprint)
    check("tokenizer", here, origin, str(path), "it has changed since; train again, or put back the one it was")
    return tokenizer


def load_generator(path: str | Path) -> Any:
    """A generator in evaluation mode on the CPU, from a name (`openmoji`), a run, a component folder, a released file.

    A released file is `hf:` and the name of a published model or owner/repository/file (see `consonar.convert.hub`).
    Its `origin` says what it was made of and with. Raises `UserError` for a missing, damaged or unfinished folder, and
    for weights of another shape.
    """
    folder = model_folder(path)
    config = checkpoint.read_config(folder)
    if config.pop("component", None) != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    for item in fields(Origin):
        config.pop(item.name, None)
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in GENERATORS:
        raise unknown(f"{folder}: kind", kind, GENERATORS)
    config_class, generator_class = GENERATORS[kind]
    settings = from_dict(config, str(folder / "config.json"), config_class)
    generator = checkpoint.load_module(lambda: generator_class(settings), folder)
    generator.origin = read_origin(path)
    names = generator.origin.class_names or ()
    if len(names) > generator.num_classes:
        raise UserError(f"{folder / 'config.json'}: class_names are {len(names)} for {generator.num_classes} classes")
    check_distinct(names, str(folder / "config.json"))
    return generator
