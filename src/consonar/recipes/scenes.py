"""Recipes on scenes: arranged emoji with captions (`data.scenes`), read by MiniLM, which pip brings."""

from dataclasses import replace

from consonar.generators.rear import REAR_PRESETS
from consonar.recipes import openmoji
from consonar.training.config import DataConfig, TrainConfig

SCENES = DataConfig(images="scenes", validation_items=1000)


def tokenizer_scenes_64() -> TrainConfig:
    """The shipped tokenizer of 8 x 8 tokens: `openmoji-64` trained on (see its model card)."""
    start = openmoji.tokenizer_openmoji_64()
    return replace(
        start,
        recipe="tokenizer-scenes-64",
        init="openmoji-64",
        data=DataConfig(images="scenes:8000", validation_items=200),
        optim=replace(start.optim, warmup_steps=20),
        loop=replace(start.loop, steps=500, batch_size=16, validate_every=250, save_every=50, ema_decay=0.98),
    )


def tokenizer_scenes_64_f4() -> TrainConfig:
    """The shipped tokenizer of 16 x 16 tokens: `openmoji-64-f4` trained on (see its model card)."""
    start = openmoji.tokenizer_openmoji_64_f4()
    return replace(
        start,
        recipe="tokenizer-scenes-64-f4",
        init="openmoji-64-f4",
        objective=openmoji.RECONSTRUCTION,
        data=DataConfig(images="scenes:10000", validation_items=200),
        optim=replace(start.optim, lr=1.5e-3, warmup_steps=50),
        loop=replace(start.loop, steps=1200, batch_size=8, validate_every=300, save_every=50, ema_decay=0.99),
    )


def ar_scenes() -> TrainConfig:
    """Plain AR on captions: tokens of `tokenize --tokenizer scenes-64 --data scenes --out tokens/scenes`."""
    start = openmoji.ar_openmoji()
    shape = replace(REAR_PRESETS["tiny"], condition="text", caption_dim=384, num_condition_tokens=32)
    return replace(
        start,
        recipe="ar-scenes",
        tokenizer="scenes-64",
        text_encoder="minilm",
        model=shape,
        data=DataConfig(tokens="tokens/scenes", validation_items=1000),
        loop=replace(start.loop, steps=4000, validate_every=500, sample_every=1000, save_every=500),
    )


def rear_scenes() -> TrainConfig:
    """reAR with the published noise schedule and weight, otherwise `ar-scenes`."""
    return replace(ar_scenes(), recipe="rear-scenes", objective=openmoji.REAR)


def vapi_scenes() -> TrainConfig:
    """VA-pi on a generator trained on scenes, `--init RUN`; its perceptual distance needs no download."""
    return replace(openmoji.vapi_openmoji(), recipe="vapi-scenes", data=SCENES)


def vapi_spatial_scenes() -> TrainConfig:
    """VA-pi with credit by place, smoothed over the decoder's receptive field; otherwise `vapi-scenes`."""
    return replace(vapi_scenes(), recipe="vapi-spatial-scenes", objective=openmoji.vapi_spatial_openmoji().objective)


def ce_scenes() -> TrainConfig:
    """The control of `vapi-scenes`: cross-entropy alone, same images, noise and steps."""
    return replace(vapi_scenes(), recipe="ce-scenes", objective=openmoji.ce_openmoji().objective)
