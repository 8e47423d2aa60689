"""VQGAN (arXiv 2012.09841) without attention: MaskGIT's tokenizer (arXiv 2202.04200), as reAR, RAR and TiTok use it,
and VQGAN+ (MaskBit, arXiv 2409.16211), with a codebook or with the bits of lookup-free quantisation; and what all
convolutional tokenizers share.

State-dict keys are those of the released files (`maskgit-vqgan-imagenet-f16-256.bin`; MaskBit's `ConvVQModel`, reAR's
`VQPlus`). Facts kept from their code (1d-tokenizer's `maskgit_vqgan.py`, MaskBit's `autoencoder.py`): networks work on
pixels in [0, 1], so images change range at the border of the tokenizer; GroupNorm with eps 1e-6; residual blocks have
no biases in their convolutions and, where the number of channels changes, their 1x1 shortcut is applied to the OUTPUT
of the branch, so that the block's input is dropped; "same" padding, which for stride 2 is one row below and one column
on the right; nearest-neighbour upsampling and a convolution double the resolution.

MaskGIT's halves it by average pooling, its decoder's levels are stored from full to lowest resolution and run the other
way, and its codes are not normalised. VQGAN+ halves it by stride-2 convolutions or by average pooling, its levels are
stored in the order of execution, and its codes may be l2-normalised on both sides of the search. Lookup-free
(MAGVIT-v2, arXiv 2310.05737): a code is the signs of the latents, in {-1, +1}, with 0 counted as -1; its token is the
sum of 2^i over the positive channels i = 0, 1, ...

Deviations: released groups are always 32; here `num_groups` is a field, so that tiny models exist. MaskGIT's `decode`
clamps to [0, 1], ours leaves clamping to the caller. The constant tables of the lookup-free quantiser are no buffers.

Letters: `B` batch, `N` tokens (raster order), `V` vocabulary, `C` code width, `h`, `w` token grid, `H`, `W` pixels.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from consonar.errors import UserError
from consonar.options import Count, ReadOnlyWith
from consonar.tokenizers.base import Codebook, CodebookSize, CodebookTokenizer, TokenizerConfig, as_grid, as_row
from consonar.types import Grid

CODEBOOK = ReadOnlyWith(lambda given: given.quantizer == "lookup", "{}quantizer 'lookup': lookup-free codes are signs")


@dataclass(frozen=True, kw_only=True)
class ConvConfig(TokenizerConfig):
    """Shape of a convolutional tokenizer; the defaults are MaskGIT's."""

    vocab_size: CodebookSize = 1024
    code_dim: Count = 256
    base_channels: Count = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of `base_channels`; every level but the last halves the resolution."""
    num_res_blocks: Count = 2
    """Residual blocks per level and in the middle, in the encoder and the decoder."""
    num_groups: Count = 32
    """Groups of every GroupNorm; divides every channel count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channel_multipliers:
            raise UserError("model.channel_multipliers: empty; one number per resolution, e.g. 1 1 2 2 4")
        if self.image_size % self.downsampling:
            raise UserError(
                f"model.image_size: {self.image_size} is not a multiple of {self.downsampling} "
                "(2 to the number of channel_multipliers less one)"
            )
        for channels in (self.base_channels, *self.widths):
            if channels % self.num_groups:
                raise UserError(f"model.num_groups: {self.num_groups} does not divide {channels} channels")

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
    """x + r(x) with r = conv(silu(norm(conv(silu(norm(x)))))), and a 1x1 shortcut where the channels change.

    `drops_input`, as in both papers' code: no biases, and the shortcut is of r(x) in the place of x. One that is
    `recomputed` keeps only x for the gradient.
    """

    recomputed = False

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, drops_input: bool = True):
        super().__init__()
        bias = not drops_input
        self.norm1 = normalization(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = normalization(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)
        self.same_width, self.drops_input = channels_in == channels_out, drops_input
        if not self.same_width:
            self.nin_shortcut = nn.Conv2d(channels_out if drops_input else channels_in, channels_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(self.residual, x, use_reentrant=False)
            return recomputed
        return self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.same_width else self.nin_shortcut(hidden if self.drops_input else x))


class HalvingConv(nn.Conv2d):
    """(B, C, H / 2, W / 2) <- (B, C, H, W), padded on the right and below."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class DoublingConv(nn.Conv2d):
    """(B, C, 2 H, 2 W) <- (B, C, H, W), by repeated places."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Blocks = Literal["block", "res_blocks"]
"""What files call the residual blocks of a level; MaskGIT's are `block`, and those in the middle have no name there."""


def level(blocks: Blocks | None, channels_in: int, channels_out: int, count: int, groups: int) -> nn.Sequential:
    """The residual blocks of one resolution, under their name; the first changes the number of channels."""
    widths = [channels_in] + [channels_out] * count
    row = nn.Sequential(*(ResidualBlock(a, b, groups) for a, b in pairwise(widths)))
    return nn.Sequential(OrderedDict({blocks: row})) if blocks else row


def network(conv_in: nn.Conv2d, inner: Mapping[str, nn.Module], groups: int, conv_out: nn.Conv2d) -> nn.Sequential:
    """What encoders and decoders are: the inner parts, under their names, between two convolutions."""
    norm = normalization(conv_out.in_channels, groups)
    return nn.Sequential(OrderedDict(conv_in=conv_in, **inner, norm_out=norm, silu=nn.SiLU(), conv_out=conv_out))


class Backwards(nn.Sequential):
    """Parts that are stored the other way round than they run."""

    def forward(self, x: Tensor) -> Tensor:
        for part in reversed(self):
            x = part(x)
        return x


def conv_encoder(config: ConvConfig, blocks: Blocks, *, strided: bool) -> nn.Sequential:
    """(B, C, h, w) <- (B, 3, H, W) in [0, 1]. `strided`: convolutions halve the resolution, else means of 2 x 2."""
    widths, count, groups, down = config.widths, config.num_res_blocks, config.num_groups, nn.Sequential()
    conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
    for index, (width_in, width_out) in enumerate(pairwise([config.base_channels, *widths])):
        down.append(level(blocks, width_in, width_out, count, groups))
        if index < len(widths) - 1:
            name, change = ("down_conv", HalvingConv(width_out)) if strided else ("pool", nn.AvgPool2d(2))
            down[index].add_module(name, change)
    mid = level(None if blocks == "block" else blocks, widths[-1], widths[-1], count, groups)
    return network(conv_in, {"down": down, "mid": mid}, groups, nn.Conv2d(widths[-1], config.code_dim, 1))


def conv_decoder(config: ConvConfig, blocks: Blocks, count: int) -> nn.Sequential:
    """(B, 3, H, W) in [0, 1], not clamped <- (B, C, h, w), with `count` residual blocks a level. MaskGIT's levels are
    stored from full to lowest resolution."""
    widths, groups, backwards = config.widths[::-1], config.num_groups, blocks == "block"
    conv_in = nn.Conv2d(config.code_dim, widths[0], 3, padding=1)
    mid = level(None if backwards else blocks, widths[0], widths[0], count, groups)
    steps, up = list(pairwise([widths[0], *widths])), Backwards() if backwards else nn.Sequential()
    for width_in, width_out in reversed(steps) if backwards else steps:
        up.append(level(blocks, width_in, width_out, count, groups))
        if len(up) != (1 if backwards else len(steps)):  # all but full resolution
            up[-1].add_module("upsample_conv", DoublingConv(width_out))
    return network(conv_in, {"mid": mid, "up": up}, groups, nn.Conv2d(widths[-1], 3, 3, padding=1))


class ConvTokenizer(CodebookTokenizer):
    """A tokenizer whose networks keep the places of an image: one token per place of the grid, in raster order."""

    def __init__(self, config: ConvConfig, name: str, *, l2_normalize: bool = False):
        side = config.image_size // config.downsampling
        super().__init__(config, name, side * side, Grid(side, side), l2_normalize=l2_normalize)
        self.side = side

    def latents(self, images: Tensor) -> Tensor:
        return as_row(self.encoder(images))

    def pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(as_grid(codes, self.side))


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(ConvConfig):
    """Shape of a MaskGIT-VQGAN tokenizer; the defaults are the released one."""

    kind: Literal["maskgit-vq"] = "maskgit-vq"


class MaskGITTokenizer(ConvTokenizer):
    def __init__(self, config: MaskGITConfig, name: str = "maskgit-vq"):
        super().__init__(config, name)
        self.encoder = conv_encoder(config, "block", strided=False)
        self.decoder = conv_decoder(config, "block", config.num_res_blocks)
        self.quantize = Codebook(config.vocab_size, config.code_dim)


@dataclass(frozen=True, kw_only=True)
class VQGANPlusConfig(ConvConfig):
    """Shape of a VQGAN+ tokenizer; the defaults are the one that reAR uses."""

    kind: Literal["vqgan-plus"] = "vqgan-plus"
    vocab_size: CodebookSize = 4096
    """Number of codes; 2 to the power of `code_dim` for lookup-free ones."""
    code_dim: Count = 64
    """Width of one code; its number of bits for lookup-free ones."""
    quantizer: Literal["lookup", "lookup-free"] = "lookup"
    """Codes from a learnt codebook, or all combinations of signs."""
    l2_normalize: Annotated[bool, CODEBOOK] = False
    """Search and decode unit-norm codes; for `lookup` only."""
    downsample: Literal["convolution", "average"] = "convolution"
    """What halves the resolution in the encoder: convolutions of stride 2, or the mean of 2 x 2 places."""
    num_decoder_blocks: Count | None = None
    """Residual blocks per level and in the middle of the decoder; None: `num_res_blocks`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer == "lookup-free" and self.vocab_size != 2**self.code_dim:
            raise UserError(
                f"model.vocab_size: {self.vocab_size}; lookup-free codes of {self.code_dim} bits (code_dim) are "
                f"2 to the power of {self.code_dim}"
            )


def sign_codes(tokens: Tensor, num_bits: int) -> Tensor:
    """(..., num_bits) float in {-1, +1} <- (...) int64; channel i is the bit of weight 2^i."""
    bits = (tokens[..., None] >> torch.arange(num_bits, device=tokens.device)) & 1
    return 2.0 * bits - 1.0


def sign_tokens(vectors: Tensor) -> Tensor:
    """(...) int64 <- (..., num_bits): the inverse of `sign_codes`, for any vectors; 0 counts as -1."""
    weights = 2 ** torch.arange(vectors.shape[-1], device=vectors.device)
    return ((vectors > 0) * weights).sum(-1)


class VQGANPlusTokenizer(ConvTokenizer):
    def __init__(self, config: VQGANPlusConfig, name: str = "vqgan-plus"):
        super().__init__(config, name, l2_normalize=config.l2_normalize)
        blocks = config.num_res_blocks if config.num_decoder_blocks is None else config.num_decoder_blocks
        self.encoder = conv_encoder(config, "res_blocks", strided=config.downsample == "convolution")
        self.decoder = conv_decoder(config, "res_blocks", blocks)
        self.lookup_free = config.quantizer == "lookup-free"
        if not self.lookup_free:
            self.quantize = Codebook(config.vocab_size, config.code_dim)

    @property
    def codebook(self) -> Tensor:
        if self.lookup_free:
            device = next(self.parameters()).device
            return sign_codes(torch.arange(self.vocab_size, device=device), self.code_dim)
        return super().codebook

    def search(self, vectors: Tensor) -> Tensor:
        return sign_tokens(vectors) if self.lookup_free else super().search(vectors)

    def embed(self, tokens: Tensor) -> Tensor:
        # Not by way of the table: it has 2^18 rows in the largest released model.
        return sign_codes(tokens, self.code_dim) if self.lookup_free else super().embed(tokens)
