"""Generators by folder."""

from __future__ import annotations

from pathlib import Path

from consonar import checkpoint
from consonar.config_io import from_dict, to_dict
from consonar.errors import UserError, unknown
from consonar.generators.rear import ReARConfig, ReARGenerator

GENERATORS = {"rear": (ReARConfig, ReARGenerator)}


def save_generator(generator: ReARGenerator, folder: Path, *, tokenizer: str) -> None:
    """Writes a component folder; `tokenizer` is the name or folder of the tokenizer it was trained with."""
    config = {"component": "generator", "tokenizer": tokenizer, **to_dict(generator.config)}
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


def read_tokenizer_name(path: str | Path) -> str:
    """The name or folder of the tokenizer that a stored generator was trained with."""
    config, _ = checkpoint.read_component(model_folder(path))
    return str(config.get("tokenizer", ""))


def load_generator(path: str | Path) -> ReARGenerator:
    """A generator in evaluation mode on the CPU, from a run folder or a component folder.

    Raises `UserError` for a missing, damaged or unfinished folder, and for weights of another shape.
    """
    folder = model_folder(path)
    config, state = checkpoint.read_component(folder)
    if config.pop("component", None) != "generator":
        raise UserError(f"{folder}: not a generator folder (component in config.json)")
    config.pop("tokenizer", None)
    kind = config.get("kind")
    if kind not in GENERATORS:
        raise unknown(f"{folder}: kind", kind, GENERATORS)
    config_class, generator_class = GENERATORS[kind]
    generator = generator_class(from_dict(config, str(folder / "config.json"), config_class))
    checkpoint.load_weights(generator, state, str(folder))
    return generator.eval().requires_grad_(False)
