"""Feature networks: images to vectors.

The offline network is EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, Lite variant), ImageNet weights. A Fréchet
distance of its features is named `FD(efficientnet-lite0)`: it is not FID, which is defined by one Inception network,
`inception` (`inception.py`); its weights are a file that the user brings.

Letters: `B` batch, `F` features, `K` classes.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from consonar.cpu.kernels import channels_last
from consonar.networks.efficientnet import load_efficientnet_lite0


@runtime_checkable
class FeatureNetwork(Protocol):
    """A frozen map from images to feature vectors; any object of this shape can be given to `evaluate`."""

    name: str
    weights_sha256: str
    num_features: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1], any H and W -> (B, F) float32; one image's features ignore its batch."""
        ...


@runtime_checkable
class ScoringNetwork(FeatureNetwork, Protocol):
    """A feature network that also gives what sFID and the Inception score are made of."""

    num_spatial: int

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features (B, F), spatial features (B, num_spatial) and class probabilities (B, K), all float32."""
        ...


class EfficientNetLite0Features:
    """The 1,280 pooled features of EfficientNet-Lite0 at 224 px.

    Images of any size are resized to 224 x 224 px first: bilinear, half-pixel centres, antialiased when they shrink
    (enlarging is plain bilinear). The size is part of the metric: other sizes give other features.
    """

    name = "efficientnet-lite0"
    num_features = 1280
    input_size = 224

    def __init__(self, device: str = "cpu") -> None:
        backbone, self.weights_sha256 = load_efficientnet_lite0()
        self.device = torch.device(device)
        self.backbone = backbone.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, 1280) float32 on the network's device."""
        size = (self.input_size, self.input_size)
        pooled = []  # a CPU is twice as fast on pieces that stay in its caches, and with the channels last
        for part in images.to(self.device).split(16 if self.device.type == "cpu" else max(1, len(images))):
            part = functional.interpolate(part, size=size, mode="bilinear", antialias=True)
            pooled.append(self.backbone(channels_last(part))[1])
        return torch.cat(pooled).float()  # (B, 1280)
