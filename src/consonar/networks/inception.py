"""The Inception network as a feature network: FID, sFID and the Inception score.

Heusel et al. 2017 (arXiv 1706.08500: FID), Nash et al. 2021 (arXiv 2103.03841: sFID), Salimans et al. 2016 (arXiv
1606.03498: Inception score), in the protocol of the ADM evaluator (guided-diffusion). The network's architecture is in
`inception_network.py`, its weights are a file that the user brings (`load_inception`).

Two front ends, which are part of the metric; they give slightly different features:

- `inception`, the default, is what the TensorFlow graph of the ADM evaluator does with 8-bit images: bilinear resize to
  299 px with positions counted from the corner (`resize_from_corner`), then (x - 128) / 128. Same as torch-fidelity.
- `inception-pytorch-fid` is a bilinear resize with half-pixel centres, not antialiased, on a scale of -1 to 1.

Outputs: `pool_3` (2,048 features; FID); the first 7 channels of the graph's `mixed_6/conv`, here `Mixed_6d.branch1x1`,
at 17 x 17 places (2,023 features; sFID); class probabilities of the logits without their bias (Inception score, so in
ADM and torch-fidelity). Deviation from ADM: the port of the graph in float32, not the graph.

Letters: `B` batch, `C` channels, `H`, `W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from consonar.cpu.kernels import channels_last
from consonar.errors import check_choice
from consonar.files.weights import load_weights
from consonar.networks.inception_network import INPUT_SIZE, SPATIAL_CHANNELS, InceptionV3
from consonar.networks.weight_files import WeightFile

_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS = WeightFile(
    "inception", _NAME, f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_NAME}", "6726825d"
)


def resize_from_corner(pixels: Tensor, size: int) -> Tensor:
    """(B, C, `size`, `size`) <- (B, C, H, W) float32: bilinear as in TensorFlow 1 (`align_corners=False`).

    Output pixel i lies at i * H / `size` of the input, so the picture is moved by part of a pixel against half-pixel
    centres, and the last rows and columns repeat the border; nothing is antialiased.
    """
    for dim in (3, 2):  # in TensorFlow's order: columns first
        length = pixels.shape[dim]
        # float32 throughout: the positions are rounded as there.
        positions = torch.arange(size, dtype=torch.float32, device=pixels.device) * (length / size)
        lower = positions.long()
        share = (positions - lower).view(-1, *[1] * (3 - dim))
        below = pixels.index_select(dim, lower)
        above = pixels.index_select(dim, (lower + 1).clamp(max=length - 1))
        pixels = below + (above - below) * share
    return pixels


def tensorflow_pixels(images: Tensor) -> Tensor:
    """(B, 3, 299, 299) from images (B, 3, H, W) in [-1, 1], rounded to 8 bits first: the graph reads those alone."""
    return (resize_from_corner(((images.float() + 1) * 127.5).round(), INPUT_SIZE) - 128) / 128


def half_pixel_pixels(images: Tensor) -> Tensor:
    """(B, 3, 299, 299) from images (B, 3, H, W) in [-1, 1], as pytorch-fid resizes."""
    return functional.interpolate(images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)


FRONT_ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "inception": tensorflow_pixels,
    "inception-pytorch-fid": half_pixel_pixels,
}


class InceptionFeatures:
    """The feature network `name`, a key of `FRONT_ENDS`; its features are `pool_3`, `outputs` gives all there is."""

    num_features = 2048
    num_spatial = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, name: str, network: InceptionV3, weights_sha256: str, device: str = "cpu"):
        check_choice("inception", name, FRONT_ENDS)
        self.name, self.weights_sha256, self.front_end = name, weights_sha256, FRONT_ENDS[name]
        self.device = torch.device(device)
        self.network = network.to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, 2048) float32 on the network's device."""
        return self.outputs(images)[0]

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, 2048), spatial features (B, 2023) and class probabilities (B, 1008), float32."""
        parts = []  # small ones on a CPU: they stay in its caches
        for part in images.to(self.device).split(16 if self.device.type == "cpu" else max(1, len(images))):
            pixels = channels_last(self.front_end(part))
            _, spatial, pool3 = self.network(pixels)
            parts.append((pool3, spatial, self.network.logits(pool3).softmax(1)))
        features, spatial, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, spatial, probabilities


def load_inception(
    name: str = "inception", device: str = "cpu", *, path: str | Path | None = None, check_hash: bool = True
) -> InceptionFeatures:
    """The network with the weights of a local file; `None`: `WEIGHTS.name` in `cache_dir()`. Never downloads.

    `check_hash=False` takes any .pth state dict with its keys. Counters of training batches, which are not read, may be
    missing. Raises `UserError` when the file is missing, damaged, has other keys or shapes, or another SHA-256.
    """
    file, digest, state = WEIGHTS.read(path, check_hash=check_hash)
    # On the meta device: random weights that are overwritten at once would advance the global random generator.
    with torch.device("meta"):
        network = InceptionV3()
    network.to_empty(device="cpu")
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    load_weights(network, {**counters, **state}, f"inception: {file}")
    return InceptionFeatures(name, network, digest, device)
