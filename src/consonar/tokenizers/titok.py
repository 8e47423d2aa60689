"""TiTok: an image as a short row of tokens without places (arXiv 2406.07550; code of 1d-tokenizer, `titok.py`).

Two published forms, with the state-dict keys of their files. The first (l-32, b-64, s-128) writes logits over the codes
of MaskGIT's VQGAN, the paper's "proxy codes"; their softmax weighs that codebook, and MaskGIT's convolutional decoder,
which is part of the file, makes the pixels (`pixel_decoder` is set). The second (bl-64, bl-128, sl-256, 8192 codes)
writes pixels (`pixel_decoder` is None).

Facts kept from the released code, besides those of `vit.py`: the encoder reads [class, patches, latents], the decoder
[class, mask tokens, latents] and its outputs at the mask tokens become the image; the first form's encoder reads its
latents (B, N, D) as (B, D, N) without a transposition ("is_legacy"), which its weights depend on; nothing is clamped.

Deviations: "is_legacy" and "finetune_decoder", which no published model has apart, are one field; the first form
without a pixel decoder (stage 1 of its training, no pixels) and TiTok with a continuous or text-aware latent are not
here. The released code freezes encoder and codes while the pixel decoder is trained; here the caller decides.

Letters: those of `vit.py`; `K` codes of the pixel decoder, `Z` their width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from consonar.errors import UserError
from consonar.options import Count
from consonar.seeding import draw_weights
from consonar.tokenizers import vit
from consonar.tokenizers.base import Codebook, as_grid
from consonar.tokenizers.vqgan import MaskGITConfig, conv_decoder

RELEASED_PIXEL_DECODER = MaskGITConfig()


@dataclass(frozen=True, kw_only=True)
class TiTokConfig(vit.ViTConfig):
    """Shape of a TiTok tokenizer; the defaults are TiTok-L-32."""

    kind: Literal["titok"] = "titok"
    num_tokens: Count = 32
    """Tokens per image."""
    code_dim: Count = 12
    decoder: vit.TransformerConfig = vit.LARGE
    """The transformer that writes the image, or the logits for `pixel_decoder`."""
    l2_normalize: bool = True
    """Search and decode unit-norm codes."""
    pixel_decoder: MaskGITConfig | None = RELEASED_PIXEL_DECODER
    """The MaskGIT-VQGAN whose codebook and decoder make the pixels (first form), or None (second form)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pixels = self.pixel_decoder
        if pixels and pixels.image_size != self.image_size:
            raise UserError(
                f"model.pixel_decoder.image_size: {pixels.image_size} is not the image_size {self.image_size}"
            )
        if pixels and pixels.downsampling != self.decoder.patch_size:
            raise UserError(
                f"model.decoder.patch_size: {self.decoder.patch_size} is not the {pixels.downsampling} pixels per code "
                "of pixel_decoder (2 to the number of its channel_multipliers less one)"
            )


class TiTokDecoder(vit.Transformer):
    """(B, 3, H, W) in [0, 1], or logits (B, K, h, w) over the pixel decoder's codes <- codes (B, N, C)."""

    def __init__(self, config: TiTokConfig):
        super().__init__(config.decoder, packed=True)
        width, self.patch_size, self.side = config.decoder.width, config.decoder.patch_size, config.decoder_side
        self.writes_pixels = config.pixel_decoder is None
        self.decoder_embed = nn.Linear(config.code_dim, width)
        self.class_embedding = vit.learned_table(1, width)
        self.positional_embedding = vit.learned_table(self.side**2 + 1, width)
        self.mask_token = nn.Parameter(vit.learned_table(1, width).detach()[None])  # (1, 1, D)
        self.latent_token_positional_embedding = vit.learned_table(config.num_tokens, width)
        if config.pixel_decoder is None:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * self.patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            num_codes = config.pixel_decoder.vocab_size
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, num_codes, 1))

    def forward(self, codes: Tensor) -> Tensor:
        latents = self.decoder_embed(codes) + self.latent_token_positional_embedding  # (B, N, D)
        image = torch.cat([self.class_embedding, self.mask_token[0].expand(self.side**2, -1)])  # (1 + h*w, D)
        image = (image + self.positional_embedding).expand(len(codes), -1, -1)
        x = self.run(torch.cat([image, latents], dim=1), slice(1, 1 + self.side**2))
        x = self.ffn(as_grid(x, self.side))
        return self.conv_out(vit.patches_to_image(x, self.patch_size)) if self.writes_pixels else x


class TiTokTokenizer(vit.ViTTokenizer):
    config: TiTokConfig

    def __init__(self, config: TiTokConfig, name: str = "titok"):
        first_form = config.pixel_decoder is not None
        encoder = vit.Encoder(config, config.num_tokens, packed=True, class_token=True, scrambled=first_form)
        super().__init__(config, name, None, encoder, TiTokDecoder(config), config.l2_normalize)
        draw_weights(self)
        self.quantize = Codebook(config.vocab_size, config.code_dim)
        if config.pixel_decoder is not None:
            self.pixel_quantize = Codebook(config.pixel_decoder.vocab_size, config.pixel_decoder.code_dim)
            self.pixel_decoder = conv_decoder(config.pixel_decoder, "block", config.pixel_decoder.num_res_blocks)

    def pixels(self, codes: Tensor) -> Tensor:
        decoded = self.decoder(codes)
        if self.config.pixel_decoder is None:
            return decoded
        weights = decoded.float().softmax(1)
        latents = torch.einsum("bkhw,kz->bzhw", weights, self.pixel_quantize.embedding.weight)
        return self.pixel_decoder(latents.to(self.dtype))
