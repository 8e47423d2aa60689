"""Starting from a trained generator: what `init` says about the architecture, the tokenizer and the weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from consonar.config import TrainConfig
from consonar.errors import UserError
from consonar.generators import Origin, has_name, load_generator, read_origin
from consonar.tokenizers import SHIPPED
from consonar.types import Tokenizer


def resolve_start(config: TrainConfig) -> TrainConfig:
    """The configuration with what `init` decides filled in: the model, and the tokenizer where it was left open.

    Raises `UserError` for post-training without `init`, a start model that names no tokenizer, and a folder that is no
    generator.
    """
    if config.init is None:
        if config.aligns or config.model is None:
            raise UserError(
                f"init: {config.recipe!r} starts from a trained generator; give its run or model folder, "
                "e.g. --init runs/demo/rear"
            )
        return config
    start, origin = config.init, read_origin(config.init)
    if config.tokenizer is None:
        if origin.tokenizer is None:
            raise UserError(f"tokenizer: {config.init} does not say which tokenizer it goes with; add --tokenizer")
        config = replace(config, tokenizer=origin.tokenizer)
    if config.model is None or config.aligns:
        stored = load_generator(start).config
        if config.model is not None:
            check_same_shape(start, asdict(stored), asdict(config.model))
        config = replace(config, model=stored)
    return replace(config, init=start if has_name(start) else str(Path(start).resolve()))


def load_start(config: TrainConfig, shape: Any, tokenizer: Tokenizer) -> Any:
    """The generator of `init`, ready to be trained, with the dropout of `shape`.

    Raises `UserError` when it is of another shape, or its tokenizer is not `tokenizer`.
    """
    assert config.init is not None
    origin = read_origin(config.init)
    if origin.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise UserError(
            f"init: {config.init} was trained with another tokenizer (fingerprint "
            f"{str(origin.tokenizer_fingerprint)[:12]}) than {tokenizer.name!r} ({tokenizer.fingerprint[:12]}); "
            "its tokens mean other codes"
        )
    stored = load_generator(config.init)
    check_same_shape(config.init, asdict(stored.config), asdict(shape))
    generator = type(stored)(shape)
    generator.load_state_dict(stored.state_dict(), assign=True)
    return generator.requires_grad_(True)


def check_same_shape(where: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `UserError` for the first key in which the configurations differ; not for dropouts and sizes left open."""
    for key, value in wanted.items():
        if "drop" not in key and value not in (0, None) and stored.get(key) != value:
            raise UserError(f"model.{key}: {value!r}, but the generator in {where} has {stored.get(key)!r}")


def origin_of(config: TrainConfig, fingerprint: str, class_names: tuple[str, ...] | None) -> Origin:
    """What an exported generator says about its making."""
    assert config.tokenizer is not None
    # A folder is stored whole, so that the model works from any directory.
    by_name = config.tokenizer in SHIPPED or config.tokenizer.startswith("hf:")
    name = config.tokenizer if by_name else str(Path(config.tokenizer).resolve())
    return Origin(tokenizer=name, tokenizer_fingerprint=fingerprint, class_names=class_names)
