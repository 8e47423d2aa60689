"""Starting from a trained generator: what `init` says about the architecture, the tokenizer and the weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from consonar.components import load_generator, read_origin, weights_sha256
from consonar.errors import UserError
from consonar.generators import build_generator
from consonar.generators.base import GeneratorConfig
from consonar.json_types import Json
from consonar.model_folders import SHIPPED_GENERATORS, SHIPPED_TOKENIZERS
from consonar.origin import Origin, check, of_tokenizer
from consonar.training.config import TrainConfig
from consonar.types import Generator, ImageSource, Tokenizer


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
    by_name = start in SHIPPED_GENERATORS or start.startswith("hf:")  # a folder is stored whole
    return replace(config, init=start if by_name else str(Path(start).resolve()))


def load_start(init: str, shape: GeneratorConfig, tokenizer: Tokenizer) -> Generator:
    """The generator of `init`, ready to be trained, with the dropout of `shape`.

    Raises `UserError` when it is of another shape, or its tokenizer is not `tokenizer`.
    """
    check("tokenizer", of_tokenizer(tokenizer), read_origin(init), init, "its tokens mean other codes")
    stored = load_generator(init)
    check_same_shape(init, asdict(stored.config), asdict(shape))
    generator = build_generator(shape)
    generator.load_state_dict(stored.state_dict(), assign=True)
    return generator.requires_grad_(True)


def check_same_shape(where: str, stored: Json, wanted: Json) -> None:
    """Raises `UserError` for the first key in which the configurations differ; not for dropouts and sizes left open."""
    for key, value in wanted.items():
        if "drop" not in key and value not in (0, None) and stored.get(key) != value:
            raise UserError(f"model.{key}: {value!r}, but the generator in {where} has {stored.get(key)!r}")


def of_source(source: ImageSource) -> Origin:
    """What is made of these images; a stream has no hash."""
    return Origin(class_names=source.class_names, data=source.name, data_sha256=getattr(source, "content_hash", None))


def check_start_classes(config: TrainConfig, key: str, given: Origin) -> None:
    """Raises `UserError` where label i of the data, named by the option `key`, is not class i of the start model."""
    if config.init is not None:
        remedy = "bring the data into the order of the model's classes with --classes FILE"
        where = f"{key}: {getattr(config.data, key.removeprefix('data.'))}"
        check(where, given, read_origin(config.init), config.init, remedy, parts=("classes",))


def origin_of(
    config: TrainConfig, tokenizer: str, fingerprint: str, data: Origin, held_out: Origin | None = None
) -> Origin:
    """What a run and its generator say about their making; without names, classes are those of `init`.

    `tokenizer` is the name or folder of the one with this fingerprint.
    """
    start = Origin() if config.init is None else read_origin(config.init)
    # A folder is stored whole, so that the model works from any directory.
    by_name = tokenizer in SHIPPED_TOKENIZERS or tokenizer.startswith("hf:")
    return Origin(
        tokenizer=tokenizer if by_name else str(Path(tokenizer).resolve()),
        tokenizer_fingerprint=fingerprint,
        class_names=data.class_names or start.class_names,
        data=data.data,
        data_sha256=data.data_sha256,
        validation_sha256=held_out.data_sha256 if held_out else None,
        init=config.init,
        init_sha256=weights_sha256(config.init) if config.init else None,
    )
