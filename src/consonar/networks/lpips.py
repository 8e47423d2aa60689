"""LPIPS v0.1 on VGG16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

Eq. 1: unit-normalise the features of five layers over channels, take squared differences, weigh the channels by human
judgements, average over space, sum over layers. The trunk is VGG16 (Simonyan & Zisserman 2015) up to relu5_3 under
torchvision's key names, so that the weight file published for torchvision loads without torchvision.

Deviations: evaluation only, so the dropout before the linear weights is left out; the gradient reaches the first
argument alone.

The linear weights `lpips_v0.1_vgg_lin.npz` are the published ones, BSD-2-Clause; their licence lies beside them.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from consonar.float32 import in_float32
from consonar.hub import read_name, released_file
from consonar.networks.base import LayerDistance, WeightFile, with_weights

_NAME = "vgg16-397923af.pth"
WEIGHTS = WeightFile("lpips", _NAME, f"https://download.pytorch.org/models/{_NAME}", "397923af")
LINEAR_WEIGHTS = Path(__file__).with_name("lpips_v0.1_vgg_lin.npz")
SMALLEST_INPUT = 16
"""Pixels; four poolings halve them to one."""
# Output channels of the convolutions between two poolings; the last ReLU of each group is a layer of the distance.
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
NORM_EPS = 1e-10
# ImageNet mean and standard deviation on the [-1, 1] scale, rounded as in the released scaling layer.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """The convolutions of VGG16: (B, 3, H, W) -> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

    H and W are `SMALLEST_INPUT` or more; the maps have 1, 1/2, 1/4, 1/8, 1/16 of them. Keys: `features.N.weight|bias`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group in WIDTHS:
            for width in group:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, hidden: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(hidden)
            hidden = layer(hidden)
        return [*maps, hidden]


@in_float32
def weighted_difference(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1 at every place of one layer: (B, h, w) <- features a, b (B, C, h, w), channel weights (C,)."""
    # vector_norm and not the root of a sum: the gradient of the latter is NaN where every feature is zero.
    unit_a = a / (torch.linalg.vector_norm(a, dim=1, keepdim=True) + NORM_EPS)
    unit_b = b / (torch.linalg.vector_norm(b, dim=1, keepdim=True) + NORM_EPS)
    return ((unit_a - unit_b).square() * weight[:, None, None]).sum(1)


class LPIPS(LayerDistance):
    """LPIPS v0.1 (VGG16); images have `SMALLEST_INPUT` pixels a side or more, and are not resized here."""

    name, bears_bf16 = "lpips", True

    def __init__(self, trunk: VGG16Features, weights_sha256: str):
        """`trunk` holds its weights already (`load_lpips`); `weights_sha256` is that of their file, for reports."""
        super().__init__()
        self.trunk, self.weights_sha256 = trunk, weights_sha256
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        with np.load(LINEAR_WEIGHTS) as arrays:
            for index in range(len(WIDTHS)):
                self.register_buffer(f"linear{index}", torch.from_numpy(arrays[f"lin{index}.model.1.weight"]).flatten())
        self.shift: Tensor
        self.scale: Tensor
        self.eval().requires_grad_(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        return self.trunk((images - self.shift) / self.scale)

    def difference(self, layer: int, a: Tensor, b: Tensor) -> Tensor:
        return weighted_difference(a, b, self.get_buffer(f"linear{layer}"))


def load_lpips(path: str | Path | None = None, *, check_hash: bool = True) -> LPIPS:
    """LPIPS with the VGG16 weights of a local file; `None`: `vgg16-397923af.pth` in `cache_dir()`.

    The file is torchvision's (.pth), or with `check_hash=False` any state dict with its `features.*` keys (.pth or
    .safetensors); other keys, such as the classifier's, are not read. `hf:owner/repository/file` is such a file of the
    Hugging Face hub, e.g. `hf:timm/vgg16.tv_in1k/model.safetensors`: the only download, and its hash is not checked.
    Raises `UserError` when the file is missing, damaged, has other keys or shapes, or its SHA-256 is not the published
    one.
    """
    if path is not None and str(path).startswith("hf:"):
        path, check_hash = released_file(read_name(str(path))), False
    file, digest, state = WEIGHTS.read(path, check_hash=check_hash)
    state = {key: value for key, value in state.items() if key.startswith("features.")}
    return LPIPS(with_weights(VGG16Features, state, f"lpips: {file}"), digest)
