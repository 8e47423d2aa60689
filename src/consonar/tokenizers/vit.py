"""What TiTok and AliTok share: transformer blocks, the encoder of latent tokens, and the tokenizer around them.

Facts kept from the released code of both (1d-tokenizer `modules/blocks.py`, `alitok.py`): pre-norm blocks with exact
GELU, an MLP of four times the width and LayerNorm with eps 1e-5; no dropout and no mask, every position sees every
other; the encoder reads image patches first and learned queries after them, and its outputs at the queries are the
latents; the networks work on pixels in [0, 1], so images change range at the border of the tokenizer; pixels leave a
decoder as patches whose channels are ordered (row, column, colour).

Deviations: widths, depths and patches are fields, released sizes are fixed or named.

Letters: `B` batch, `N` tokens, `V` vocabulary, `C` code width, `D` transformer width, `L` positions, `P` patch side,
`h`, `w` patch grid, `H`, `W` pixels.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.errors import UserError
from consonar.options import Count, Depth, Divides, check_options
from consonar.tokenizers.base import CodebookSize, CodebookTokenizer, TokenizerConfig, as_row
from consonar.types import Grid


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of one side, encoder or decoder."""

    width: Count
    """Width of the residual stream."""
    num_layers: Depth
    """Number of blocks."""
    num_heads: Annotated[Count, Divides("width")]
    """Attention heads per block; divides `width`."""
    patch_size: Count = 16
    """Side of the square patches that the image is cut into, pixels."""


BASE = TransformerConfig(width=768, num_layers=12, num_heads=12)
LARGE = TransformerConfig(width=1024, num_layers=24, num_heads=16)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(TokenizerConfig):
    """Shape of a tokenizer with a transformer on either side; `TiTokConfig` and `AliTokConfig` set the defaults."""

    vocab_size: CodebookSize = 4096
    encoder: TransformerConfig = LARGE
    """The transformer that reads the image."""
    decoder: TransformerConfig = LARGE
    """The transformer that writes the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, side in (("model.encoder", self.encoder), ("model.decoder", self.decoder)):
            check_options(side, f"{key}.")
            if self.image_size % side.patch_size:
                raise UserError(f"{key}.patch_size: {side.patch_size} does not divide the image_size {self.image_size}")

    @property
    def decoder_side(self) -> int:
        """Patches along one side of the image as the decoder writes it."""
        return self.image_size // self.decoder.patch_size


class Attention(nn.Module):
    """Self-attention. The projection to queries, keys and values has the names of `nn.MultiheadAttention` in TiTok's
    files (`packed`), and is a layer in AliTok's."""

    def __init__(self, width: int, num_heads: int, *, packed: bool):
        super().__init__()
        self.num_heads, self.packed = num_heads, packed
        if packed:
            self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        else:
            self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every position over all: (B, L, D) <- (B, L, D)."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias) if self.packed else self.in_proj(x)
        q, k, v = projected.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, packed: bool):
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.num_heads, packed=packed)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """What encoders and decoders are made of: norm, blocks, norm. Subclasses add what goes in and out."""

    def __init__(self, config: TransformerConfig, *, packed: bool):
        super().__init__()
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = nn.ModuleList(Block(config, packed=packed) for _ in range(config.num_layers))
        self.ln_post = nn.LayerNorm(config.width)

    def run(self, x: Tensor, kept: slice) -> Tensor:
        """(B, kept, D) <- (B, L, D): the outputs at the positions `kept`."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        return self.ln_post(x[:, kept])


class Encoder(Transformer):
    """Latents (B, N, C) <- images (B, 3, H, W) in [0, 1] and queries (N, D); a class token first where there is one."""

    def __init__(self, config: ViTConfig, num_tokens: int, *, packed: bool, class_token: bool, scrambled: bool):
        super().__init__(config.encoder, packed=packed)
        width, patch_size = config.encoder.width, config.encoder.patch_size
        self.num_tokens, self.class_token, self.scrambled = num_tokens, class_token, scrambled
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        if class_token:
            self.class_embedding = learned_table(1, width)
        num_patches = (config.image_size // patch_size) ** 2
        self.positional_embedding = learned_table(num_patches + class_token, width)
        self.latent_token_positional_embedding = learned_table(num_tokens, width)
        self.conv_out = nn.Conv2d(width, config.code_dim, 1)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        x = as_row(self.patch_embed(images))  # (B, h*w, D)
        if self.class_token:
            x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)
        queries = (queries + self.latent_token_positional_embedding).expand(len(x), -1, -1)
        x = torch.cat([x + self.positional_embedding, queries], dim=1)
        latents = self.run(x, slice(-self.num_tokens, None))  # (B, N, D)
        # The first TiTok was trained with (B, N, D) read as (B, D, N): each output mixes positions and channels.
        latents = latents.reshape(len(x), -1, self.num_tokens) if self.scrambled else latents.transpose(1, 2)
        return as_row(self.conv_out(latents.unsqueeze(3)))


def learned_table(rows: int, width: int) -> nn.Parameter:
    """Learned vectors (rows, width), drawn as the released code does."""
    return nn.Parameter(width**-0.5 * torch.randn(rows, width))


def patches_to_image(x: Tensor, patch_size: int) -> Tensor:
    """(B, 3, h*P, w*P) <- (B, P*P*3, h, w), channels ordered (row, column, colour)."""
    patches = x.unflatten(1, (patch_size, patch_size, 3))  # (B, P, P, 3, h, w)
    return patches.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class ViTTokenizer(CodebookTokenizer):
    """A tokenizer whose encoder reads learned queries, `latent_tokens` (N, D)."""

    def __init__(
        self, config: ViTConfig, name: str, grid: Grid | None, encoder: Encoder, decoder: nn.Module, l2_normalize: bool
    ):
        super().__init__(config, name, encoder.num_tokens, grid, l2_normalize=l2_normalize)
        self.encoder, self.decoder = encoder, decoder
        self.latent_tokens = learned_table(encoder.num_tokens, config.encoder.width)

    def latents(self, images: Tensor) -> Tensor:
        return self.encoder(images, self.latent_tokens)

    def pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(codes)
