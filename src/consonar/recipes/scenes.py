"""Recipes on scenes: arranged emoji with captions (`data.scenes`), read by MiniLM, which pip brings."""

from dataclasses import replace

from consonar.generators.rear import REAR_PRESETS
from consonar.recipes import openmoji
from consonar.training.config import DataConfig, TrainConfig

SCENES = DataConfig(images="scenes", validation_items=1000)


def ar_scenes() -> TrainConfig:
    """Plain AR on captions: tokens of `tokenize --tokenizer openmoji-64 --data scenes --out tokens/scenes`."""
    start = openmoji.ar_openmoji()
    shape = replace(REAR_PRESETS["tiny"], condition="text", caption_dim=384, num_condition_tokens=32)
    return replace(
        start,
        recipe="ar-scenes",
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
