"""One valid instance of every kind of configuration, for tests that walk through all of their fields."""

import dataclasses
import typing
from typing import Any

from consonar.generators import GENERATORS
from consonar.sampling.sample import SamplerConfig
from consonar.tokenizers import TOKENIZERS
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives import kinds
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import OptimConfig

CONFIGS: dict[type, Any] = {
    TrainConfig: TrainConfig(recipe="x", tokenizer="t"),
    **{kind: kind() for kind in (DataConfig, LoopConfig, OptimConfig, SamplerConfig)},
    **{kind: kind() for kind in (AutoregressiveConfig, NoiseConfig, ReconstructionConfig, GuardConfig)},
    **{kind: kind(rewards={"mse": 1.0}) for kind in kinds("post-training").values()},
    **{row.config: row.config() for registry in (GENERATORS, TOKENIZERS) for row in registry.values()},
}


def floats_in(kind: type) -> list[str]:
    """The fields that hold a float, or a table of them."""
    hints = typing.get_type_hints(kind)
    found = {item.name: hints[item.name] for item in dataclasses.fields(kind)}
    return [name for name, hint in found.items() if hint is float or float in typing.get_args(hint)]
