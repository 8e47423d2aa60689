"""The Inception network that FID is defined by, without torchvision; what is measured with it is in `inception.py`.

Szegedy et al. 2015 (arXiv 1512.00567), in the weights of 2015-12-05 as pytorch-fid and torch-fidelity ported them to
PyTorch (one file, whose keys are ours). It differs from torchvision's Inception: average pools leave the padding out of
the mean, the last block pools by maximum, BatchNorm has an epsilon of 0.001, there are 1,008 classes, and no auxiliary
head. Deviation: evaluation only.

Letters: `B` batch, `C` channels, `H`, `W` places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUT_SIZE = 299
"""Pixels."""
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
NORM_EPS = 1e-3


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU: (B, C, H, W) -> (B, `width`, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(hidden)), inplace=True)


@dataclass(frozen=True)
class Layer:
    """One convolution of a block, by its key. With stride 1 the size is kept, with stride 2 nothing is padded."""

    key: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1

    def build(self, channels: int) -> ConvNorm:
        padding = (self.kernel[0] // 2, self.kernel[1] // 2) if self.stride == 1 else (0, 0)
        return ConvNorm(channels, self.width, self.kernel, self.stride, padding)


Branch = tuple[tuple[Layer, ...], ...]
"""Steps in a row; the layers of one step stand side by side, their outputs are concatenated."""
Pool = Callable[[Tensor], Tensor]

average_pool: Pool = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool: Pool = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool: Pool = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """A block: branches side by side on the input and one on the pooled input, concatenated in this order."""

    def __init__(self, channels: int, branches: tuple[Branch, ...], pool: Pool, pool_width: int = 0):
        """`pool_width`: channels of the convolution after the pool, 0 for none."""
        super().__init__()
        pooled: Branch = ((Layer("branch_pool", pool_width),),) if pool_width else ()
        self.branches, self.pooled, self.pool = branches, pooled, pool
        for branch in (*branches, pooled):
            width = channels
            for step in branch:
                for layer in step:
                    self.add_module(layer.key, layer.build(width))
                width = sum(layer.width for layer in step)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of the branches' widths, H, W), or half of H and W."""
        outputs = [self._run(branch, hidden) for branch in self.branches]
        return torch.cat([*outputs, self._run(self.pooled, self.pool(hidden))], 1)

    def _run(self, branch: Branch, hidden: Tensor) -> Tensor:
        for step in branch:
            outputs = [self.get_submodule(layer.key)(hidden) for layer in step]
            hidden = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return hidden


def chain(*layers: Layer) -> Branch:
    """A branch whose steps have one layer each."""
    return tuple((layer,) for layer in layers)


def block_35(channels: int, pool_width: int) -> Mixed:
    """A block at 35 x 35 places (figure 5 of the paper, with one 5 x 5 kernel left)."""
    branches = (
        chain(Layer("branch1x1", 64)),
        chain(Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
        chain(
            Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))
        ),
    )  # fmt: skip
    return Mixed(channels, branches, average_pool, pool_width)


def block_17(channels: int, width: int) -> Mixed:
    """A block at 17 x 17 places with 7 x 7 kernels as rows and columns (figure 6), `width` channels inside."""
    row, column = (1, 7), (7, 1)
    branches = (
        chain(Layer("branch1x1", 192)),
        chain(
            Layer("branch7x7_1", width), Layer("branch7x7_2", width, row), Layer("branch7x7_3", 192, column)
        ),
        chain(
            Layer("branch7x7dbl_1", width), Layer("branch7x7dbl_2", width, column),
            Layer("branch7x7dbl_3", width, row), Layer("branch7x7dbl_4", width, column),
            Layer("branch7x7dbl_5", 192, row),
        ),
    )  # fmt: skip
    return Mixed(channels, branches, average_pool, 192)


def block_8(channels: int, pool: Pool) -> Mixed:
    """A block at 8 x 8 places whose branches fork at their ends (figure 7)."""
    row, column = (1, 3), (3, 1)
    branches = (
        chain(Layer("branch1x1", 320)),
        (
            *chain(Layer("branch3x3_1", 384)),
            (Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)),
        ),
        (
            *chain(Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3))),
            (Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
        ),
    )
    return Mixed(channels, branches, pool, 192)


REDUCE_TO_17 = (
    chain(Layer("branch3x3", 384, (3, 3), 2)),
    chain(
        Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3), 2)
    ),
)  # fmt: skip
REDUCE_TO_8 = (
    chain(Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2)),
    chain(
        Layer("branch7x7x3_1", 192), Layer("branch7x7x3_2", 192, (1, 7)), Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, (3, 3), 2),
    ),
)  # fmt: skip


class InceptionOutputs(NamedTuple):
    """What one pass gives."""

    maps: tuple[Tensor, Tensor, Tensor]
    """(B, 64, 73, 73) and (B, 192, 35, 35) after the pools of the stem, (B, 768, 17, 17) before the 8 x 8 blocks."""
    spatial: Tensor
    """(B, 2023): places first, then channels, as ADM flattens them."""
    pool3: Tensor
    """(B, 2048)."""


class InceptionV3(nn.Module):
    """Frozen network on pixels (B, 3, 299, 299) that a front end has scaled; state-dict keys of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, (0, 0))
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
        self.fc = nn.Linear(2048, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InceptionV3:
        """Stays in evaluation mode: a frozen measure has no other."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> InceptionOutputs:
        first = halving_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels))))
        second = halving_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)))
        hidden = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(second))))
        hidden = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(hidden)))
        spatial = hidden[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # the block begins with its branch1x1
        third = self.Mixed_6e(hidden)
        pool3 = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(third))).mean((2, 3))
        return InceptionOutputs((first, second, third), spatial, pool3)

    def logits(self, pool3: Tensor, *, bias: bool = False) -> Tensor:
        """(B, 1008) from `pool3` (B, 2048); the Inception score takes them without the bias."""
        return functional.linear(pool3, self.fc.weight, self.fc.bias if bias else None)
