"""Recipes on OpenMoji at 64 px with the shipped tokenizer: some minutes on two CPU cores, nothing to fetch."""

from dataclasses import replace

from consonar.generators.rear import REAR_PRESETS, ReARConfig
from consonar.tokenizers.vq import VQConfig
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import OptimConfig

OPENMOJI_REWARDS = {"mse": 1.0, "efficientnet-lite0": 1.0}
F4_LOOP = LoopConfig(log_every=20, validate_every=250, sample_every=500, save_every=250, ema_decay=0.998)
RECONSTRUCTION = ReconstructionConfig(mse_weight=4.0, chroma_weight=8.0, perceptual_weight=0.1)
REAR = AutoregressiveConfig(embedding_weight=1.0, head_width=256, noise=NoiseConfig(schedule="truncated_linear"))


def ar_openmoji() -> TrainConfig:
    """Plain AR, tiny generator, OpenMoji at 64 px: some minutes on two CPU cores."""
    return TrainConfig(
        recipe="ar-openmoji",
        tokenizer="openmoji-64",
        model=REAR_PRESETS["tiny"],
        objective=AutoregressiveConfig(),
        data=DataConfig(tokens="tokens/openmoji-64"),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=50),
        loop=LoopConfig(steps=900, batch_size=64, log_every=10, validate_every=100, sample_every=300, save_every=300),
    )


def rear_openmoji() -> TrainConfig:
    """reAR with the published noise schedule and weight, otherwise `ar-openmoji`."""
    return replace(ar_openmoji(), recipe="rear-openmoji", objective=REAR)


def tokenizer_openmoji_64() -> TrainConfig:
    """The shipped tokenizer: 64 px, 1,024 codes, 8 x 8 tokens (see its model card)."""
    loop = LoopConfig(steps=2800, batch_size=32, log_every=20, validate_every=200, sample_every=400, save_every=200)
    return TrainConfig(
        recipe="tokenizer-openmoji-64",
        model=VQConfig(base_channels=16, channel_multipliers=(1, 2, 4, 8), num_groups=16),
        objective=RECONSTRUCTION,
        data=DataConfig(images="openmoji", flip=True),
        optim=OptimConfig(lr=2e-3, min_lr=2e-5, warmup_steps=100, beta2=0.95, weight_decay=1e-4),
        loop=replace(loop, precision="fp32"),  # narrow convolutions on a CPU are faster in float32 than in bf16
    )


def tokenizer_openmoji_64_f4() -> TrainConfig:
    """Tokenizer of the shipped generator: 64 px, 16 x 16 tokens, patch discriminator."""
    return replace(
        tokenizer_openmoji_64(),
        recipe="tokenizer-openmoji-64-f4",
        model=VQConfig(base_channels=32, channel_multipliers=(1, 2, 4), num_groups=16),
        objective=replace(RECONSTRUCTION, discriminator_weight=0.03, discriminator_start=1500),
        loop=replace(F4_LOOP, steps=2600, batch_size=16),
    )


def rear_openmoji_f4() -> TrainConfig:
    """The shipped generator: a small reAR on `openmoji-64-f4`, 16 x 16 tokens of shifted and mirrored views.

    They are those of `tokenize --tokenizer openmoji-64-f4 --data openmoji --views shift_flip`.
    """
    return TrainConfig(
        recipe="rear-openmoji-f4",
        tokenizer="openmoji-64-f4",
        model=ReARConfig(width=224, num_layers=5, num_heads=4, dropout=0.1),
        objective=REAR,
        data=DataConfig(tokens="tokens/openmoji-64-f4-shift", views="shift_flip"),
        optim=OptimConfig(lr=1.5e-3, min_lr=2e-5, warmup_steps=100, weight_decay=0.1),
        loop=replace(F4_LOOP, steps=3000, batch_size=32),
    )


def rear_openmoji_f4_tune() -> TrainConfig:
    """The end of the shipped generator's training, `--init RUN`: where emoji lie, and without noise."""
    start = rear_openmoji_f4()
    return replace(
        start,
        recipe="rear-openmoji-f4-tune",
        model=None,
        objective=replace(REAR, noise=NoiseConfig()),
        data=DataConfig(tokens="tokens/openmoji-64-f4", views="center_flip"),
        optim=replace(start.optim, lr=7e-4, warmup_steps=40),
        loop=replace(start.loop, steps=700, validate_every=100, sample_every=0, save_every=100, ema_decay=0.99),
    )


def vapi_openmoji() -> TrainConfig:
    """VA-pi on a generator trained on OpenMoji, `--init RUN`; its perceptual distance needs no download."""
    return TrainConfig(
        recipe="vapi-openmoji",
        model=None,
        objective=PolicyConfig(rewards=OPENMOJI_REWARDS, ce_weight=0.1),
        data=DataConfig(images="openmoji"),
        optim=OptimConfig(lr=1e-4, min_lr=1e-4, warmup_steps=0, beta2=0.999, weight_decay=1e-4),
        loop=LoopConfig(steps=100, batch_size=32, log_every=5, validate_every=50, sample_every=0, save_every=50),
    )


def vapi_spatial_openmoji() -> TrainConfig:
    """VA-pi with credit by place, smoothed over the decoder's receptive field; otherwise `vapi-openmoji`."""
    objective = PolicyConfig(rewards=OPENMOJI_REWARDS, ce_weight=0.1, credit="token", smooth_credit=True)
    return replace(vapi_openmoji(), recipe="vapi-spatial-openmoji", objective=objective)


def isentropic_openmoji() -> TrainConfig:
    """VA-pi that moves probability between codes without sharpening: `vapi-spatial-openmoji`, entropy held."""
    start = vapi_spatial_openmoji()
    objective = PolicyConfig(rewards=OPENMOJI_REWARDS, credit="token", smooth_credit=True, entropy="position")
    return replace(start, recipe="isentropic-openmoji", objective=objective)


def ce_openmoji() -> TrainConfig:
    """The control of `vapi-openmoji`: cross-entropy alone, same images, noise and steps."""
    return replace(vapi_openmoji(), recipe="ce-openmoji", objective=CrossEntropyConfig(rewards=OPENMOJI_REWARDS))


def sar_openmoji() -> TrainConfig:
    """Self-rollout: the true tokens after a draw of the model as context; otherwise `ce-openmoji`."""
    objective = CrossEntropyConfig(rewards=OPENMOJI_REWARDS, context_noise=1.0, corruption="drawn")
    return replace(vapi_openmoji(), recipe="sar-openmoji", objective=objective)


def soft_openmoji() -> TrainConfig:
    """Cross-entropy against targets softened by code distance; otherwise `ce-openmoji`."""
    objective = CrossEntropyConfig(rewards=OPENMOJI_REWARDS, target="soft")
    return replace(vapi_openmoji(), recipe="soft-openmoji", objective=objective)


def ste_openmoji() -> TrainConfig:
    """Straight-through gradients of the pixel loss; otherwise `vapi-openmoji`."""
    objective = StraightThroughConfig(rewards=OPENMOJI_REWARDS, perceptual="efficientnet-lite0")
    return replace(vapi_openmoji(), recipe="ste-openmoji", objective=objective)


def free_openmoji() -> TrainConfig:
    """AR-GRPO: free-running rollouts, rewarded by how near their features are to a real image of the class."""
    objective = PolicyConfig(rollout="free", rewards={"embedding": 1.0}, ce_weight=0.0, kl_weight=0.01)
    return replace(vapi_openmoji(), recipe="free-openmoji", objective=objective)
