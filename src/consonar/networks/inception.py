"""The Inception network and what is measured with it: FID, sFID and the Inception score.

Heusel et al. 2017 (arXiv 1706.08500: FID), Nash et al. 2021 (arXiv 2103.03841: sFID), Salimans et al. 2016 (arXiv
1606.03498: Inception score), in the protocol of the ADM evaluator (guided-diffusion). The weights are a file that the
user brings (`load_inception`).

The network: Szegedy et al. 2015 (arXiv 1512.00567), in the weights of 2015-12-05 as pytorch-fid and torch-fidelity
ported them to PyTorch (one file, whose keys are ours). It differs from torchvision's Inception: average pools leave the
padding out of the mean, the last block pools by maximum, BatchNorm has an epsilon of 0.001, there are 1,008 classes,
and no auxiliary head. Deviations: evaluation only; and from ADM, the port of the graph in float32, not the graph.

Two front ends, which are part of the metric; they give slightly different features:

- `inception`, the default, is what the TensorFlow graph of the ADM evaluator does with 8-bit images: bilinear resize to
  299 px with positions counted from the corner (`resize_from_corner`), then (x - 128) / 128. Same as torch-fidelity.
- `inception-pytorch-fid` is a bilinear resize with half-pixel centres, not antialiased, on a scale of -1 to 1.

Outputs: `pool_3` (2,048 features; FID); the first 7 channels of the graph's `mixed_6/conv`, here `Mixed_6d.branch1x1`,
at 17 x 17 places (2,023 features; sFID); class probabilities of the logits without their bias (Inception score, so in
ADM and torch-fidelity).

Letters: `B` batch, `C` channels, `H`, `W` pixels or places.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from consonar.cpu.kernels import channels_last
from consonar.errors import check_choice
from consonar.networks.base import Frozen, WeightFile, pieces, with_weights

INPUT_SIZE = 299
"""Pixels."""
SPATIAL_CHANNELS = 7
_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS = WeightFile(
    "inception", _NAME, f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_NAME}", "6726825d"
)


class Conv(NamedTuple):
    """One convolution. With stride 1 the size is kept, with stride 2 or where not `padded` nothing is padded."""

    width: int
    rows: int = 1
    columns: int = 1
    stride: int = 1
    padded: bool = True


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU: (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, channels: int, form: Conv):
        super().__init__()
        padding = (form.rows // 2, form.columns // 2) if form.padded and form.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, form.width, (form.rows, form.columns), form.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(form.width, eps=1e-3)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(hidden)), inplace=True)


Branches = dict[str, list[Conv | list[Conv]]]
"""Steps in a row, by the name that keys begin with; of a list in a step, the outputs are concatenated."""
Pool = Callable[[Tensor], Tensor]

average_pool: Pool = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool: Pool = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool: Pool = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """A block: branches side by side on the input and one on the pooled input, concatenated in this order."""

    def __init__(self, channels: int, branches: Branches, pool: Pool, pool_width: int = 0):
        """`pool_width`: channels of the convolution after the pool, 0 for none."""
        super().__init__()
        self.pool = pool
        self.branches = [self._add(name, steps, channels) for name, steps in branches.items()]
        self.pooled = self._add("branch_pool", [Conv(pool_width)], channels) if pool_width else []

    def _add(self, name: str, steps: list[Conv | list[Conv]], channels: int) -> list[list[str]]:
        """Makes the layers of a branch; gives the keys of every step."""
        branch = []
        for number, step in enumerate(steps, 1):
            key = f"{name}_{number}" if len(steps) > 1 else name
            convs = step if isinstance(step, list) else [step]
            layers = [f"{key}a", f"{key}b"] if len(convs) > 1 else [key]
            for layer, conv in zip(layers, convs, strict=True):
                self.add_module(layer, ConvNorm(channels, conv))
            channels = sum(conv.width for conv in convs)
            branch.append(layers)
        return branch

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of the branches' widths, H, W), or half of H and W."""
        outputs = [self._run(branch, hidden) for branch in self.branches]
        return torch.cat([*outputs, self._run(self.pooled, self.pool(hidden))], 1)

    def _run(self, branch: list[list[str]], hidden: Tensor) -> Tensor:
        for step in branch:
            outputs = [self.get_submodule(key)(hidden) for key in step]
            hidden = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return hidden


def block_35(channels: int, pool_width: int) -> Mixed:
    """A block at 35 x 35 places (figure 5 of the paper, with one 5 x 5 kernel left)."""
    branches: Branches = {
        "branch1x1": [Conv(64)],
        "branch5x5": [Conv(48), Conv(64, 5, 5)],
        "branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3)],
    }
    return Mixed(channels, branches, average_pool, pool_width)


def block_17(channels: int, width: int) -> Mixed:
    """A block at 17 x 17 places with 7 x 7 kernels as rows and columns (figure 6), `width` channels inside."""
    row, column = Conv(width, 1, 7), Conv(width, 7, 1)
    branches: Branches = {
        "branch1x1": [Conv(192)],
        "branch7x7": [Conv(width), row, Conv(192, 7, 1)],
        "branch7x7dbl": [Conv(width), column, row, column, Conv(192, 1, 7)],
    }
    return Mixed(channels, branches, average_pool, 192)


def block_8(channels: int, pool: Pool) -> Mixed:
    """A block at 8 x 8 places whose branches fork at their ends (figure 7)."""
    fork = [Conv(384, 1, 3), Conv(384, 3, 1)]
    branches: Branches = {
        "branch1x1": [Conv(320)],
        "branch3x3": [Conv(384), fork],
        "branch3x3dbl": [Conv(448), Conv(384, 3, 3), fork],
    }
    return Mixed(channels, branches, pool, 192)


REDUCE_TO_17: Branches = {
    "branch3x3": [Conv(384, 3, 3, 2)],
    "branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3, 2)],
}
REDUCE_TO_8: Branches = {
    "branch3x3": [Conv(192), Conv(320, 3, 3, 2)],
    "branch7x7x3": [Conv(192), Conv(192, 1, 7), Conv(192, 7, 1), Conv(192, 3, 3, 2)],
}


class InceptionV3(Frozen):
    """Frozen network on pixels (B, 3, 299, 299) that a front end has scaled; state-dict keys of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, Conv(32, 3, 3, 2))
        self.Conv2d_2a_3x3 = ConvNorm(32, Conv(32, 3, 3, padded=False))
        self.Conv2d_2b_3x3 = ConvNorm(32, Conv(64, 3, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, Conv(80))
        self.Conv2d_4a_3x3 = ConvNorm(80, Conv(192, 3, 3, padded=False))
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = Mixed(288, REDUCE_TO_17, halving_pool)
        self.Mixed_6b = block_17(768, 128)
        self.Mixed_6c = block_17(768, 160)
        self.Mixed_6d = block_17(768, 160)
        self.Mixed_6e = block_17(768, 192)
        self.Mixed_7a = Mixed(768, REDUCE_TO_8, halving_pool)
        self.Mixed_7b = block_8(1280, average_pool)
        # The published graph pools by maximum here, unlike the paper and torchvision.
        self.Mixed_7c = block_8(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`pool_3` (B, 2048), and spatial features (B, 2023): places first, then channels, as ADM flattens them."""
        hidden = halving_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels))))
        hidden = halving_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)))
        hidden = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden))))
        hidden = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(hidden)))
        spatial = hidden[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # the block begins with its branch1x1
        pool3 = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(hidden)))).float().mean((2, 3))
        return pool3, spatial


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
    """The feature network `name`, a key of `FRONT_ENDS`; its features are `pool_3`, `outputs` gives all there is.
    `place` is what loads it again where the weights are not in the default place, else empty."""

    num_features = 2048
    num_spatial = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, name: str, network: InceptionV3, weights_sha256: str, device: str = "cpu", place: str = ""):
        check_choice("inception", name, FRONT_ENDS)
        self.name, self.weights_sha256, self.front_end = name, weights_sha256, FRONT_ENDS[name]
        self.device, self.place = torch.device(device), place
        self.network = network.to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] on any device -> (B, 2048) float32 on the network's device."""
        return self.outputs(images)[0]

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, 2048), spatial features (B, 2023) and class probabilities (B, 1008), float32."""
        parts = []
        for piece in pieces(images, self.device):
            pool3, spatial = self.network(channels_last(self.front_end(piece)))
            parts.append((pool3, spatial, functional.linear(pool3, self.network.fc.weight).softmax(1)))
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
    means = [key for key in state if key.endswith("running_mean")]
    counters = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means}
    network = with_weights(InceptionV3, {**counters, **state}, f"inception: {file}")
    return InceptionFeatures(name, network, digest, device, "" if path is None else f"{name}:{path}")
