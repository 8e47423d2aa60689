"""What the convolutional tokenizers share: configuration and layout; and what MaskGIT's VQGAN and VQGAN+ share: blocks.

Facts kept from the released code of the two (1d-tokenizer's `maskgit_vqgan.py`, MaskBit's `autoencoder.py`): networks
work on pixels in [0, 1], so images change range at the border of the tokenizer; GroupNorm with eps 1e-6; residual
blocks have no biases in their convolutions and, where the number of channels changes, their 1x1 shortcut is applied to
the OUTPUT of the branch, so that the block's input is dropped; "same" padding, which for stride 2 is one row below and
one column on the right.

Deviation: released groups are always 32; here `num_groups` is a field, so that tiny models exist.

Letters: `B` batch, `N` tokens (raster order), `V` vocabulary, `C` code width, `h`, `w` token grid, `H`, `W` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from consonar.data.transforms import check_image_size
from consonar.errors import UserError
from consonar.options import check_options
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Grid, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ConvConfig(ModelConfig):
    """Shape of a convolutional tokenizer; the defaults are MaskGIT's."""

    image_size: int = 256
    """Side of the square images, pixels."""
    vocab_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Width of one code."""
    base_channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of `base_channels`; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level and in the middle, in the encoder and the decoder."""
    num_groups: int = 32
    """Groups of every GroupNorm; divides every channel count."""

    def __post_init__(self) -> None:
        check_options(self, "model.")
        check_image_size(self.image_size, "model.image_size")
        for key in ("vocab_size", "code_dim", "base_channels", "num_res_blocks", "num_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}: {getattr(self, key)} is not positive")
        if not self.channel_multipliers:
            raise UserError("model.channel_multipliers: empty; one number per resolution, e.g. 1 1 2 2 4")
        if self.image_size % self.downsampling:
            raise UserError(
                f"model.image_size: {self.image_size} is not a multiple of {self.downsampling} "
                "(2 to the number of channel_multipliers less one)"
            )
        for multiplier in (1, *self.channel_multipliers):
            if multiplier < 1 or self.base_channels * multiplier % self.num_groups:
                raise UserError(
                    f"model.num_groups: {self.num_groups} does not divide {self.base_channels * multiplier} channels"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each resolution, from full to lowest."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]


def normalization(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + r(x) with r = conv(silu(norm(conv(silu(norm(x)))))); r(x) + shortcut(r(x)) where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = normalization(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = normalization(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.same_width = channels_in == channels_out
        if not self.same_width:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.same_width else self.nin_shortcut(hidden))


def residual_blocks(channels_in: int, channels_out: int, count: int, groups: int) -> nn.ModuleList:
    """`count` blocks, of which the first changes the number of channels."""
    widths = [channels_in] + [channels_out] * count
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))


def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class ConvTokenizer(CodebookTokenizer):
    """A tokenizer whose networks keep the places of an image: one token per place of the grid, in raster order."""

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: ConvConfig, name: str, *, l2_normalize: bool = False):
        side = config.image_size // config.downsampling
        super().__init__(config, name, side * side, Grid(side, side), l2_normalize=l2_normalize)
        self.side = side

    def maps(self, images: Tensor) -> Tensor:
        """(B, C, h, w) <- (B, 3, H, W)."""
        return self.encoder(images)

    def images(self, maps: Tensor) -> Tensor:
        """(B, 3, H, W) <- (B, C, h, w)."""
        return self.decoder(maps)

    def latents(self, images: Tensor) -> Tensor:
        return self.maps(images).flatten(2).transpose(1, 2)

    def pixels(self, codes: Tensor) -> Tensor:
        return self.images(codes.transpose(1, 2).unflatten(2, (self.side, self.side)))
