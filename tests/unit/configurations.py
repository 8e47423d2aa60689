"""One valid instance of every kind of configuration, for tests that walk through all of their fields."""

import dataclasses
import typing
from typing import Any

from consonar.config import DataConfig, LoopConfig, TrainConfig
from consonar.generators import GENERATORS
from consonar.sampling.sample import SamplerConfig
from consonar.tokenizers import TOKENIZERS
from consonar.training.alignment import GuardConfig
from consonar.training.build import ALIGNMENTS
from consonar.training.objectives import ConsistencyConfig, NoiseConfig
from consonar.training.optim import OptimConfig
from consonar.training.vq_objective import ReconstructionConfig

CONFIGS: dict[type, Any] = {
    TrainConfig: TrainConfig(recipe="x", tokenizer="t"),
    **{kind: kind() for kind in (DataConfig, LoopConfig, OptimConfig, SamplerConfig)},
    **{kind: kind() for kind in (ConsistencyConfig, NoiseConfig, ReconstructionConfig, GuardConfig)},
    **{kind: kind(rewards={"mse": 1.0}) for kind in ALIGNMENTS},
    **{kind: kind() for registry in (GENERATORS, TOKENIZERS) for kind, _ in registry.values()},
}


def floats_in(kind: type) -> list[str]:
    """The fields that hold a float, or a table of them."""
    hints = typing.get_type_hints(kind)
    found = {item.name: hints[item.name] for item in dataclasses.fields(kind)}
    return [name for name, hint in found.items() if hint is float or float in typing.get_args(hint)]
