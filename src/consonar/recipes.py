"""Recipes: functions that return a complete `TrainConfig`. Variants use `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from consonar.config import DataConfig, LoopConfig, TrainConfig
from consonar.errors import unknown
from consonar.generators.rear import REAR_PRESETS
from consonar.tokenizers.vq import VQConfig
from consonar.training.objectives import ConsistencyConfig, NoiseConfig
from consonar.training.optim import OptimConfig
from consonar.training.vq_objective import ReconstructionConfig


def ar_openmoji() -> TrainConfig:
    """Plain AR, tiny generator, OpenMoji at 64 px: some minutes on two CPU cores."""
    return TrainConfig(
        recipe="ar-openmoji",
        tokenizer="openmoji-64",
        model=REAR_PRESETS["tiny"],
        objective=ConsistencyConfig(),
        data=DataConfig(tokens="tokens/openmoji-64"),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=50),
        loop=LoopConfig(steps=900, batch_size=64, log_every=10, validate_every=100, sample_every=300, save_every=300),
    )


def rear_openmoji() -> TrainConfig:
    """reAR with the published noise schedule and weight, otherwise `ar-openmoji`."""
    return replace(
        ar_openmoji(),
        recipe="rear-openmoji",
        objective=ConsistencyConfig(
            embedding_weight=1.0, head_width=256, noise=NoiseConfig(schedule="truncated_linear")
        ),
    )


def tokenizer_openmoji_64() -> TrainConfig:
    """The shipped tokenizer: 64 px, 1,024 codes, 8 x 8 tokens (see its model card)."""
    return TrainConfig(
        recipe="tokenizer-openmoji-64",
        model=VQConfig(base_channels=16, channel_multipliers=(1, 2, 4, 8), num_groups=16),
        objective=ReconstructionConfig(mse_weight=4.0, chroma_weight=8.0, perceptual_weight=0.1),
        data=DataConfig(images="openmoji", flip=True),
        optim=OptimConfig(lr=2e-3, min_lr=2e-5, warmup_steps=100, beta2=0.95, weight_decay=1e-4),
        loop=LoopConfig(
            steps=2800,
            batch_size=32,
            log_every=20,
            validate_every=200,
            sample_every=400,
            save_every=200,
            precision="fp32",  # narrow convolutions on a CPU are faster in float32 than in bf16
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ar-openmoji": ar_openmoji,
    "rear-openmoji": rear_openmoji,
    "tokenizer-openmoji-64": tokenizer_openmoji_64,
}


def find_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; `UserError` lists the choices."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
