"""Convolutional VQ tokenizer of LlamaGen's architecture family (arXiv 2406.06525, section 2.1), at any width.

State-dict keys are those of the released `vq_ds16_c2i.pt`, so that released weights load without renaming. Facts kept
from it: GroupNorm with eps 1e-6; single-head spatial attention at the lowest resolution (every residual block of that
level and the middle); stride-2 convolutions padded on the right and bottom; nearest-neighbour upsampling; codes
l2-normalised on both sides of the search; the output is not clamped.

Letters: `B` batch, `N` tokens (raster order), `C` code width, `h`, `w` token grid.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from consonar.data.transforms import ImageSize
from consonar.options import Count
from consonar.tokenizers import vqgan
from consonar.tokenizers.base import Codebook, as_grid, as_row


@dataclass(frozen=True, kw_only=True)
class VQConfig(vqgan.ConvConfig):
    """Shape of a convolutional VQ tokenizer; the defaults are the one for OpenMoji at 64 px."""

    kind: Literal["vq"] = "vq"
    image_size: ImageSize = 64
    code_dim: Count = 8
    base_channels: Count = 32
    channel_multipliers: tuple[Count, ...] = (1, 2, 2, 4)
    num_res_blocks: Count = 1
    """Residual blocks per level in the encoder; the decoder has one more."""
    latent_channels: Count = 64
    """Channels between the convolutions and the projection to `code_dim`."""
    l2_normalize: bool = True
    """Search and decode unit-norm codes."""


Change = Literal["downsample", "upsample"]


class SpatialAttention(nn.Module):
    """Single-head attention over all places of the feature map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = vqgan.normalization(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, channels)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention at the lowest one, and then what changes it."""

    def __init__(
        self, channels_in: int, channels_out: int, num_blocks: int, groups: int, change: Change | None, *, attend: bool
    ):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.res = nn.ModuleList(vqgan.ResidualBlock(a, b, groups, drops_input=False) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(channels_out, groups) for _ in range(num_blocks if attend else 0))
        self.change = change
        if change:
            kind = vqgan.HalvingConv if change == "downsample" else vqgan.DoublingConv
            self.add_module(change, nn.Sequential(OrderedDict(conv=kind(channels_out))))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.get_submodule(self.change)(x) if self.change else x


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        vqgan.ResidualBlock(channels, channels, groups, drops_input=False),
        SpatialAttention(channels, groups),
        vqgan.ResidualBlock(channels, channels, groups, drops_input=False),
    )


def levels(widths: Sequence[int], num_blocks: int, groups: int, change: Change) -> nn.Sequential:
    """One for each step from a width to the next; all but the last change the resolution."""
    last = len(widths) - 2
    lowest = last if change == "downsample" else 0
    return nn.Sequential(*(
        Level(a, b, num_blocks, groups, change if i < last else None, attend=i == lowest)
        for i, (a, b) in enumerate(pairwise(widths))
    ))  # fmt: skip


def encoder(config: VQConfig) -> nn.Sequential:
    widths, groups = [config.base_channels, *config.widths], config.num_groups
    conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
    blocks = levels(widths, config.num_res_blocks, groups, "downsample")
    inner = {"conv_blocks": blocks, "mid": middle(widths[-1], groups)}
    return vqgan.network(conv_in, inner, groups, nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1))


def decoder(config: VQConfig) -> nn.Sequential:
    widths, groups = [config.widths[-1], *reversed(config.widths)], config.num_groups
    conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
    mid = middle(widths[0], groups)
    inner = {"mid": mid, "conv_blocks": levels(widths, config.num_res_blocks + 1, groups, "upsample")}
    return vqgan.network(conv_in, inner, groups, nn.Conv2d(widths[-1], 3, 3, padding=1))


class VQTokenizer(vqgan.ConvTokenizer):
    unit_range = False

    def __init__(self, config: VQConfig, name: str = "vq"):
        super().__init__(config, name, l2_normalize=config.l2_normalize)
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quantize = Codebook(config.vocab_size, config.code_dim, bound=1.0)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        return as_row(self.quant_conv(self.encoder(images)))

    def pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(as_grid(codes, self.side)))
