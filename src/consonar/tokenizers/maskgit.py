"""MaskGIT's tokenizer: VQGAN (arXiv 2012.09841) without attention (arXiv 2202.04200), as reAR, RAR and TiTok use it.

State-dict keys are those of the released `maskgit-vqgan-imagenet-f16-256.bin`. Facts kept from its code (1d-tokenizer),
besides those of `conv.py`: average pooling halves the resolution; nearest-neighbour upsampling and a convolution double
it; the decoder's levels are stored from full to lowest resolution and run the other way; codes are not normalised.

Deviations: the released `decode` clamps to [0, 1], ours leaves clamping to the caller; images are [-1, 1] outside of
the module. Files do not tell the image size and the number of groups: 256 and 32, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from consonar.tokenizers.base import Codebook
from consonar.tokenizers.conv import ConvConfig, ConvTokenizer, normalization, residual_blocks, run


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(ConvConfig):
    """Shape of a MaskGIT-VQGAN tokenizer; the defaults are the released one."""

    kind: Literal["maskgit-vq"] = "maskgit-vq"


class Level(nn.Module):
    """Residual blocks of one resolution; the decoder's also hold the convolution after upsampling."""

    # Set by the decoder on all but the full resolution; called there.
    upsample_conv: nn.Conv2d

    def __init__(self, channels_in: int, channels_out: int, config: MaskGITConfig):
        super().__init__()
        self.block = residual_blocks(channels_in, channels_out, config.num_res_blocks, config.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return run(self.block, x)


class MaskGITEncoder(nn.Module):
    """(B, C, h, w) <- (B, 3, H, W) in [0, 1]."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(width_in, width_out, config)
            for width_in, width_out in zip([config.base_channels, *widths], widths, strict=False)
        )
        self.mid = residual_blocks(widths[-1], widths[-1], config.num_res_blocks, config.num_groups)
        self.norm_out = normalization(widths[-1], config.num_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(run(self.mid, x))))


class MaskGITDecoder(nn.Module):
    """(B, 3, H, W) in [0, 1], not clamped <- (B, C, h, w)."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = residual_blocks(widths[-1], widths[-1], config.num_res_blocks, config.num_groups)
        self.up = nn.ModuleList()
        for index, (width_in, width_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(width_in, width_out, config)
            if index:
                level.upsample_conv = nn.Conv2d(width_out, width_out, 3, padding=1)
            self.up.append(level)
        self.norm_out = normalization(widths[0], config.num_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = run(self.mid, self.conv_in(x))
        for index, level in reversed(list(enumerate(self.up))):
            assert isinstance(level, Level)
            x = level(x)
            if index:
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITTokenizer(ConvTokenizer):
    """The tokenizer as a module; follows `consonar.types.Tokenizer`."""

    def __init__(self, config: MaskGITConfig, name: str = "maskgit-vq"):
        super().__init__(config, name)
        self.encoder, self.decoder = MaskGITEncoder(config), MaskGITDecoder(config)
        self.quantize = Codebook(config.vocab_size, config.code_dim)
