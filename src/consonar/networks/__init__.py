"""Networks that judge pictures: distances of image pairs, features of images, realness. A new one is a row here.

Letters: `B` batch, `F` features, `K` classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from consonar.errors import check_choice
from consonar.networks import efficientnet, lpips
from consonar.networks.base import LayerDistance
from consonar.networks.inception import FRONT_ENDS, InceptionFeatures, load_inception
from consonar.networks.vision_transformers import KINDS, VisionTransformerFeatures, load_vision_transformer


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


@dataclass(frozen=True)
class PerceptualDistance:
    """A distance of image pairs (B, 3, H, W) in [-1, 1], (B,), by a network's features."""

    smallest_input: int
    """Smallest image side in pixels that it reads."""
    load: Callable[[str | None], LayerDistance]
    """From a file of weights, or the default place of them."""


PERCEPTUAL_DISTANCES: dict[str, PerceptualDistance] = {
    "efficientnet-lite0": PerceptualDistance(
        efficientnet.SMALLEST_INPUT, lambda weights: efficientnet.PerceptualDistance()
    ),
    "lpips": PerceptualDistance(lpips.SMALLEST_INPUT, lpips.load_lpips),
}
FEATURE_NETWORKS: dict[str, Callable[[str], FeatureNetwork]] = {
    "efficientnet-lite0": efficientnet.EfficientNetLite0Features,
    **{name: partial(load_inception, name) for name in FRONT_ENDS},
}
"""Name to the network on a device. One of `vision_transformers.KINDS` is named with its place, as dinov2:FOLDER; one of
`inception.FRONT_ENDS` may be, as inception:FILE."""


def record_of(network: FeatureNetwork) -> dict[str, str]:
    """What results say of a network: name, hash, and of one that was named with a place that name as well."""
    found = {"name": network.name, "sha256": network.weights_sha256}
    place = network.place if isinstance(network, VisionTransformerFeatures | InceptionFeatures) else ""
    return found | {"place": place} if place else found


def load_feature_network(name: str | FeatureNetwork, device: str = "cpu") -> FeatureNetwork:
    """The feature network called `name` on `device`, or as it is where it is one; UserError for another name, or where
    its weights are missing."""
    if not isinstance(name, str):
        return name
    kind, colon, file = name.partition(":")
    if colon and kind in KINDS:
        return load_vision_transformer(name, device)
    if colon and kind in FRONT_ENDS:
        return load_inception(kind, device, path=file)
    check_choice("feature_network", name, [*FEATURE_NETWORKS, *(f"{kind}:FOLDER" for kind in KINDS)])
    return FEATURE_NETWORKS[name](device)
