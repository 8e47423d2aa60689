"""What a state dict is, by keys, shapes and types alone: nothing is read or written before all is known."""

from dataclasses import dataclass

import torch

from consonar.config_io import from_dict, to_dict
from consonar.convert.layouts import OFFICIALS
from consonar.convert.layouts.official import Official, Shapes, State, shapes_of
from consonar.data.transforms import IMAGE_SIDE
from consonar.errors import UserError
from consonar.files.weights import check_weights
from consonar.generators import GENERATORS
from consonar.json_types import Json, JsonMap
from consonar.tokenizers import TOKENIZERS, TokenizerModule
from consonar.types import Generator, Grid, ModelConfig

# Reduction of the tokenizers that LlamaGen's released generators were trained with.
LLAMAGEN_REDUCTION = 16


@dataclass(frozen=True)
class Found:
    """What a state dict is: the record, our configuration, and our module on the meta device."""

    official: Official
    config: ModelConfig
    module: Generator | TokenizerModule


def recognise(shapes: Shapes, where: str) -> Official:
    """The one record that these keys and shapes are of; `UserError` lists what is known and what the file holds."""
    found = [official for official in OFFICIALS if official.recognises(shapes)]
    assert len(found) < 2, f"{where}: recognised as {[official.name for official in found]}"
    if not found:
        known = ", ".join(official.name for official in OFFICIALS)
        held = ", ".join(sorted(shapes)[:4])
        raise UserError(f"{where}: not a released model that is known here ({known}); its first keys: {held}")
    return found[0]


def build(component: str, config: ModelConfig, name: str) -> Generator | TokenizerModule:
    """The tokenizer or generator of a configuration, on the meta device: keys and shapes, no memory."""
    with torch.device("meta"):
        if component == "tokenizer":
            return TOKENIZERS[config.kind].model(config, name=name)
        return GENERATORS[config.kind].model(config)


def examine(state: State, where: str, *, image_size: int | None = None, settings: JsonMap | None = None) -> Found:
    """What a state dict is. Reads shapes and types alone; `UserError` for unknown or missing keys, or other shapes."""
    meta = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    official = recognise(shapes_of(meta), where)
    try:
        config = official.config(shapes_of(meta))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        cause = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: looks like {official.name}, but {cause}") from error
    changes = {**(sized(config, image_size, where) if image_size is not None else {}), **(settings or {})}
    if changes:
        config = from_dict({**to_dict(config), **changes}, where, type(config))
    ours, unused = official.to_ours(meta, config)
    module = build(official.component, config, "converted")
    check_weights(module.state_dict(), ours, f"{where}: looks like {official.name}")
    back = official.to_official(ours, unused, config)
    assert shapes_of(back) == shapes_of(meta), f"{official.name}: the way back changes keys or shapes"
    return Found(official, config, module)


def sized(config: ModelConfig, image_size: int, where: str) -> Json:
    """The fields of `config` for this image size; `UserError` where the shapes say it already."""
    IMAGE_SIDE.check("--image-size", image_size)
    if hasattr(config, "image_size"):
        return {"image_size": image_size}
    if config.kind != "llamagen":
        raise UserError(f"--image-size: the shapes of {where} say how many tokens an image has; leave it away")
    side, rest = divmod(image_size, LLAMAGEN_REDUCTION)
    if rest:
        raise UserError(f"--image-size: {image_size} is not a multiple of {LLAMAGEN_REDUCTION}")
    return {"grid": to_dict(Grid(side, side)), "num_tokens": side * side}
