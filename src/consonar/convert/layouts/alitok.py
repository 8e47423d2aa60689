"""Released files of AliTok's tokenizer (arXiv 2506.05289), `AliTok.pth`: our keys are theirs."""

from __future__ import annotations

import math

from consonar.convert.layouts.official import Official, Shapes
from consonar.convert.layouts.vit import transformer_from_shapes
from consonar.tokenizers.alitok import AliTokConfig


def recognises(shapes: Shapes) -> bool:
    """Learned latents and an encoder without a class token or TiTok's mask token."""
    own = ("latent_tokens", "decoder.class_embedding", "encoder.patch_embed.weight", "quantize.embedding.weight")
    foreign = ("encoder.class_embedding", "decoder.mask_token")
    return all(key in shapes for key in own) and not any(key in shapes for key in foreign)


def config_from_shapes(shapes: Shapes) -> AliTokConfig:
    """All sizes from the file; heads as published (see `vit.py`)."""
    num_encoder_patches = shapes["encoder.positional_embedding"][0]
    image_size = math.isqrt(num_encoder_patches) * shapes["encoder.patch_embed.weight"][-1]
    decoder_patch_size = math.isqrt(shapes["decoder.ffn.0.weight"][0] // 3)
    num_decoder_patches = (image_size // decoder_patch_size) ** 2
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return AliTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_prefix_tokens=shapes["latent_tokens"][0] - num_decoder_patches,
        num_buffer_tokens=shapes["decoder.class_embedding"][0],
        encoder=transformer_from_shapes(shapes, "encoder", image_size, num_encoder_patches),
        decoder=transformer_from_shapes(shapes, "decoder", image_size, num_decoder_patches),
    )


OFFICIAL = Official(
    name="AliTok tokenizer",
    component="tokenizer",
    recognises=recognises,
    config=config_from_shapes,
)
