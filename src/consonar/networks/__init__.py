"""Networks that judge pictures: distances of image pairs, features of images, realness. A new one is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from consonar.errors import check_choice
from consonar.networks import efficientnet, lpips
from consonar.networks.features import EfficientNetLite0Features, FeatureNetwork
from consonar.networks.inception import load_inception


@dataclass(frozen=True)
class PerceptualDistance:
    """A distance of image pairs (B, 3, H, W) in [-1, 1], (B,), by a network's features."""

    smallest_input: int
    """Smallest image side in pixels that it reads."""
    load: Callable[[str | None], nn.Module]
    """From a file of weights, or the default place of them; the module also has `maps` and `weights_sha256`."""


PERCEPTUAL_DISTANCES: dict[str, PerceptualDistance] = {
    "efficientnet-lite0": PerceptualDistance(
        efficientnet.SMALLEST_INPUT, lambda weights: efficientnet.PerceptualDistance()
    ),
    "lpips": PerceptualDistance(lpips.SMALLEST_INPUT, lpips.load_lpips),
}
FEATURE_NETWORKS: dict[str, Callable[[str], FeatureNetwork]] = {
    "efficientnet-lite0": EfficientNetLite0Features,
    "inception": partial(load_inception, "inception"),
    "inception-pytorch-fid": partial(load_inception, "inception-pytorch-fid"),
}
"""Name to the network on a device."""


def load_feature_network(name: str, device: str = "cpu") -> FeatureNetwork:
    """The feature network called `name` on `device`; UserError for another name, or where its weights are missing."""
    check_choice("feature_network", name, FEATURE_NETWORKS)
    return FEATURE_NETWORKS[name](device)
