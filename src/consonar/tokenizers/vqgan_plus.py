"""VQGAN+ (MaskBit, arXiv 2409.16211), with a codebook or with the bits of lookup-free quantisation.

State-dict keys are those of the released files (MaskBit's `ConvVQModel`, reAR's `VQPlus`). Facts kept from their code,
besides those of `conv.py`: the resolution is halved by stride-2 convolutions or by average pooling; the decoder's
levels are stored in the order of execution; codes may be l2-normalised on both sides of the search. Lookup-free
(MAGVIT-v2, arXiv 2310.05737): a code is the signs of the latents, in {-1, +1}, with 0 counted as -1; its token is the
sum of 2^i over the positive channels i = 0, 1, ...

Deviations: images are [-1, 1] outside of the module; the constant tables of the released lookup-free quantiser are not
kept as buffers, and written anew on the way back. Files do not tell the image size, the number of groups and whether
codes are normalised: 256, 32 and not, as published. Not read: MaskBit's copy of MaskGIT's tokenizer, whose decoder is
stored the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.errors import UserError
from consonar.tokenizers.base import Codebook
from consonar.tokenizers.conv import ConvConfig, ConvTokenizer, normalization, residual_blocks, run


@dataclass(frozen=True, kw_only=True)
class VQGANPlusConfig(ConvConfig):
    """Shape of a VQGAN+ tokenizer; the defaults are the one that reAR uses."""

    kind: Literal["vqgan-plus"] = "vqgan-plus"
    vocab_size: int = 4096
    """Number of codes; 2 to the power of `code_dim` for lookup-free ones."""
    code_dim: int = 64
    """Width of one code; its number of bits for lookup-free ones."""
    quantizer: Literal["lookup", "lookup-free"] = "lookup"
    """Codes from a learnt codebook, or all combinations of signs."""
    l2_normalize: bool = False
    """Search and decode unit-norm codes; for `lookup` only."""
    downsample: Literal["convolution", "average"] = "convolution"
    """What halves the resolution in the encoder: convolutions of stride 2, or the mean of 2 x 2 places."""
    num_decoder_blocks: int | None = None
    """Residual blocks per level and in the middle of the decoder; None: `num_res_blocks`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_decoder_blocks is not None and self.num_decoder_blocks < 1:
            raise UserError(f"model.num_decoder_blocks: {self.num_decoder_blocks} is not positive")
        if self.quantizer == "lookup-free" and self.vocab_size != 2**self.code_dim:
            raise UserError(
                f"model.vocab_size: {self.vocab_size}; lookup-free codes of {self.code_dim} bits (code_dim) are "
                f"2 to the power of {self.code_dim}"
            )
        if self.quantizer == "lookup-free" and self.l2_normalize:
            raise UserError("model.l2_normalize: True is for quantizer 'lookup'; lookup-free codes are signs")


def sign_codes(tokens: Tensor, num_bits: int) -> Tensor:
    """(..., num_bits) float in {-1, +1} <- (...) int64; channel i is the bit of weight 2^i."""
    bits = (tokens[..., None] >> torch.arange(num_bits, device=tokens.device)) & 1
    return 2.0 * bits - 1.0


def sign_tokens(vectors: Tensor) -> Tensor:
    """(...) int64 <- (..., num_bits): the inverse of `sign_codes`, for any vectors; 0 counts as -1."""
    weights = 2 ** torch.arange(vectors.shape[-1], device=vectors.device)
    return ((vectors > 0) * weights).sum(-1)


class Stage(nn.Module):
    """Residual blocks of one resolution, and the convolution that changes it, if there is one."""

    # Set by the encoder or the decoder on all but the last stage; called there.
    down_conv: nn.Conv2d
    upsample_conv: nn.Conv2d

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, groups: int):
        super().__init__()
        self.res_blocks = residual_blocks(channels_in, channels_out, num_blocks, groups)

    def forward(self, x: Tensor) -> Tensor:
        return run(self.res_blocks, x)


class VQGANPlusEncoder(nn.Module):
    """(B, C, h, w) <- (B, 3, H, W) in [0, 1]."""

    def __init__(self, config: VQGANPlusConfig):
        super().__init__()
        widths, blocks, groups = config.widths, config.num_res_blocks, config.num_groups
        self.strided = config.downsample == "convolution"
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for index, (width_in, width_out) in enumerate(zip([config.base_channels, *widths[:-1]], widths, strict=True)):
            stage = Stage(width_in, width_out, blocks, groups)
            if self.strided and index < len(widths) - 1:
                stage.down_conv = nn.Conv2d(width_out, width_out, 3, stride=2)
            self.down.append(stage)
        self.mid = Stage(widths[-1], widths[-1], blocks, groups)
        self.norm_out = normalization(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, stage in enumerate(self.down):
            assert isinstance(stage, Stage)
            x = stage(x)
            if index < len(self.down) - 1:
                x = stage.down_conv(F.pad(x, (0, 1, 0, 1))) if self.strided else F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANPlusDecoder(nn.Module):
    """(B, 3, H, W) in [0, 1], not clamped <- (B, C, h, w)."""

    def __init__(self, config: VQGANPlusConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.num_groups
        blocks = config.num_res_blocks if config.num_decoder_blocks is None else config.num_decoder_blocks
        self.conv_in = nn.Conv2d(config.code_dim, widths[0], 3, padding=1)
        self.mid = Stage(widths[0], widths[0], blocks, groups)
        self.up = nn.ModuleList()
        for index, (width_in, width_out) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            stage = Stage(width_in, width_out, blocks, groups)
            if index < len(widths) - 1:
                stage.upsample_conv = nn.Conv2d(width_out, width_out, 3, padding=1)
            self.up.append(stage)
        self.norm_out = normalization(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for index, stage in enumerate(self.up):
            assert isinstance(stage, Stage)
            x = stage(x)
            if index < len(self.up) - 1:
                x = stage.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANPlusTokenizer(ConvTokenizer):
    """The tokenizer as a module; follows `consonar.types.Tokenizer`."""

    def __init__(self, config: VQGANPlusConfig, name: str = "vqgan-plus"):
        super().__init__(config, name, l2_normalize=config.l2_normalize)
        self.encoder, self.decoder = VQGANPlusEncoder(config), VQGANPlusDecoder(config)
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
