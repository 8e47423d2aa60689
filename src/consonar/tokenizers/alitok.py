"""AliTok: 17 prefix tokens and a 16 x 16 grid of tokens that suit a causal generator (arXiv 2506.05289; `alitok.py`).

State-dict keys are those of the released `AliTok.pth`. Facts kept from its code, besides those of `vit.py`: the
encoder reads [patches, latents] without a class token; latents are the prefix (the code's "auxiliary" tokens) first and
then the grid in raster order; the decoder reads [32 learned tokens, latents], and its outputs at the grid become the
image; the last layer is a sigmoid, so that decoded images lie within [-1, 1]; codes are not normalised. The causal
decoder of the paper belongs to its first training stage; the released one, of the second, sees all tokens.

Deviations: the released sizes are constants, here they are the fields' defaults. The training losses of the two stages
are not here.

Letters: those of `vit.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from consonar.options import Count, CountOrZero
from consonar.seeding import draw_weights
from consonar.tokenizers import vit
from consonar.tokenizers.base import Codebook, as_grid
from consonar.types import Grid


@dataclass(frozen=True, kw_only=True)
class AliTokConfig(vit.ViTConfig):
    """Shape of an AliTok tokenizer; the defaults are the released one."""

    kind: Literal["alitok"] = "alitok"
    code_dim: Count = 32
    num_prefix_tokens: CountOrZero = 17
    """Tokens before the grid; the grid has one token per patch of the decoder."""
    num_buffer_tokens: CountOrZero = 32
    """Learned vectors that the decoder reads before the tokens."""
    encoder: vit.TransformerConfig = vit.BASE

    @property
    def grid(self) -> Grid:
        return Grid(self.decoder_side, self.decoder_side, self.num_prefix_tokens)


class AliTokDecoder(vit.Transformer):
    """(B, 3, H, W) within [0, 1] <- codes (B, N, C)."""

    def __init__(self, config: AliTokConfig):
        super().__init__(config.decoder, packed=False)
        width, self.patch_size, self.side = config.decoder.width, config.decoder.patch_size, config.decoder_side
        self.decoder_embed = nn.Linear(config.code_dim, width)
        self.class_embedding = vit.learned_table(config.num_buffer_tokens, width)
        num_positions = config.num_buffer_tokens + config.grid.num_tokens
        self.latent_token_positional_embedding = vit.learned_table(num_positions, width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * self.patch_size**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 1)

    def forward(self, codes: Tensor) -> Tensor:
        buffer = self.class_embedding.expand(len(codes), -1, -1)
        x = torch.cat([buffer, self.decoder_embed(codes)], dim=1) + self.latent_token_positional_embedding
        x = self.run(x, slice(-(self.side**2), None))
        image = vit.patches_to_image(self.ffn(as_grid(x, self.side)), self.patch_size)
        return self.conv_out(image).sigmoid()


class AliTokTokenizer(vit.ViTTokenizer):
    def __init__(self, config: AliTokConfig, name: str = "alitok"):
        encoder = vit.Encoder(config, config.grid.num_tokens, packed=False, class_token=False, scrambled=False)
        super().__init__(config, name, config.grid, encoder, AliTokDecoder(config), l2_normalize=False)
        self.quantize = Codebook(config.vocab_size, config.code_dim)
        draw_weights(self)
