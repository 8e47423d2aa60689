"""Generators by folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from consonar import checkpoint
from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError, unknown
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.tokenizers import load_tokenizer
from consonar.tokenizers.vq import VQTokenizer

GENERATORS = {"rear": (ReARConfig, ReARGenerator)}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a stored generator was trained on; None where that is not known."""

    tokenizer: str
    """Name or folder of the tokenizer."""
    tokenizer_fingerprint: str | None = None
    class_names: tuple[str, ...] | None = None


def save_generator(generator: ReARGenerator, folder: Path, origin: Origin) -> None:
    """Writes a component folder: the generator's shape, its origin and its weights."""
    config = {"component": "generator", **to_dict(origin), **to_dict(generator.config)}
    checkpoint.save_component(folder, config, generator.state_dict())


def model_folder(path: str | Path) -> Path:
    """The component folder that a path means: itself, or `model` inside a run folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"generator: no folder {path}; give a run folder or a model folder")
    if (path / "model").is_dir():
        return path / "model"
    if (path / "metrics.jsonl").exists():
        raise UserError(
            f"generator: the run in {path} has not finished (no model folder); go on with: consonar train ... --resume"
        )
    return path


def read_component_kind(path: str | Path) -> str:
    """What a run or component folder holds: `generator` or `tokenizer`."""
    config, _ = checkpoint.read_component(model_folder(path))
    return str(config.get("component", ""))


def read_origin(path: str | Path) -> Origin:
    """The origin of a stored generator; `UserError` for a folder that is no generator or names no tokenizer."""
    folder = model_folder(path)
    config, _ = checkpoint.read_component(folder)
    if config.get("component") != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    values = {f.name: config[f.name] for f in fields(Origin) if f.name in config}
    return from_dict(values, str(folder / "config.json"), Origin)


def load_own_tokenizer(path: str | Path) -> VQTokenizer:
    """The tokenizer that a stored generator was trained with, frozen, on the CPU.

    Raises `UserError` when it is not there or its weights have changed since: other codes would decode to noise.
    """
    origin = read_origin(path)
    tokenizer = load_tokenizer(origin.tokenizer)
    if origin.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise UserError(
            f"tokenizer: {origin.tokenizer!r} has changed since {path} was trained with it "
            f"(fingerprint {tokenizer.fingerprint[:12]}, then {str(origin.tokenizer_fingerprint)[:12]}); train again"
        )
    return tokenizer


def load_generator(path: str | Path) -> ReARGenerator:
    """A generator in evaluation mode on the CPU, from a run folder or a component folder.

    Raises `UserError` for a missing, damaged or unfinished folder, and for weights of another shape.
    """
    folder = model_folder(path)
    config, state = checkpoint.read_component(folder)
    if config.pop("component", None) != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    for item in fields(Origin):
        config.pop(item.name, None)
    kind = config.get("kind")
    if kind not in GENERATORS:
        raise unknown(f"{folder}: kind", kind, GENERATORS)
    config_class, generator_class = GENERATORS[kind]
    generator = generator_class(from_dict(config, str(folder / "config.json"), config_class))
    checkpoint.load_weights(generator, state, str(folder))
    return generator.eval().requires_grad_(False)
