"""Recipes on CIFAR-10, photographs of 32 px, with the shipped tokenizer of 8 x 8 tokens.

Sized for an hour on two CPU cores, or minutes on a GPU: the generator has 8.4M parameters and sees the photographs
about five times. A GPU has room for more of both, e.g. 26M parameters and 100 epochs with --model.width 384
--model.num-layers 9 --loop.batch-size 256 --loop.steps 19500.
"""

from dataclasses import replace

from consonar.recipes import openmoji
from consonar.tokenizers.vq import VQConfig
from consonar.training.config import DataConfig, TrainConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig

PICTURES = DataConfig(images="cifar10")


def tokenizer_cifar10_32() -> TrainConfig:
    """The shipped tokenizer: 32 px, 1,024 codes, 8 x 8 tokens (see its model card)."""
    start = openmoji.tokenizer_openmoji_64_f4()
    return replace(
        start,
        recipe="tokenizer-cifar10-32",
        model=VQConfig(image_size=32, base_channels=16, channel_multipliers=(1, 2, 4), num_groups=16),
        objective=ReconstructionConfig(mse_weight=4.0, perceptual_weight=0.0),
        data=replace(PICTURES, flip=True, validation_items=1000),
        loop=replace(start.loop, steps=3000, batch_size=16, validate_every=500, sample_every=1500),
    )


def ar_cifar10() -> TrainConfig:
    """Plain AR on the tokens of `tokenize --tokenizer cifar10-32 --data cifar10 --out tokens/cifar10`."""
    start = openmoji.ar_openmoji()
    return replace(
        start,
        recipe="ar-cifar10",
        tokenizer="cifar10-32",
        data=DataConfig(tokens="tokens/cifar10", validation_items=2000),
        loop=replace(start.loop, steps=4000, validate_every=500, sample_every=1000, save_every=500),
    )


def rear_cifar10() -> TrainConfig:
    """reAR with the published noise schedule and weight, otherwise `ar-cifar10`."""
    return replace(ar_cifar10(), recipe="rear-cifar10", objective=openmoji.REAR)


def vapi_cifar10() -> TrainConfig:
    """VA-pi on a generator trained on CIFAR-10, `--init RUN`; its perceptual distance needs no download."""
    return replace(openmoji.vapi_openmoji(), recipe="vapi-cifar10", data=replace(PICTURES, validation_items=1000))


def vapi_spatial_cifar10() -> TrainConfig:
    """VA-pi with credit by place, smoothed over the decoder's receptive field; otherwise `vapi-cifar10`."""
    objective = openmoji.vapi_spatial_openmoji().objective
    return replace(vapi_cifar10(), recipe="vapi-spatial-cifar10", objective=objective)


def isentropic_cifar10() -> TrainConfig:
    """VA-pi that moves probability between codes without sharpening: `vapi-spatial-cifar10`, entropy held."""
    objective = openmoji.isentropic_openmoji().objective
    return replace(vapi_cifar10(), recipe="isentropic-cifar10", objective=objective)


def ce_cifar10() -> TrainConfig:
    """The control of `vapi-cifar10`: cross-entropy alone, same images, noise and steps."""
    return replace(vapi_cifar10(), recipe="ce-cifar10", objective=openmoji.ce_openmoji().objective)


def sar_cifar10() -> TrainConfig:
    """Self-rollout: the true tokens after a draw of the model as context; otherwise `ce-cifar10`."""
    return replace(vapi_cifar10(), recipe="sar-cifar10", objective=openmoji.sar_openmoji().objective)


def ste_cifar10() -> TrainConfig:
    """Straight-through gradients of the pixel loss; otherwise `vapi-cifar10`."""
    return replace(vapi_cifar10(), recipe="ste-cifar10", objective=openmoji.ste_openmoji().objective)
