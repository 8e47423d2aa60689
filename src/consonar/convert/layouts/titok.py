"""Released files of TiTok (arXiv 2406.07550): our keys are theirs.

Files do not tell whether codes are normalised: the first form's are, the second's are not, as published. They do not
tell the pixel decoder's groups either: 32, as published.
"""

from __future__ import annotations

import math

from consonar.convert.layouts.official import Official, Shapes, num_indices
from consonar.convert.layouts.vit import transformer_from_shapes
from consonar.tokenizers.maskgit import MaskGITConfig
from consonar.tokenizers.titok import TiTokConfig


def recognises(shapes: Shapes) -> bool:
    """TiTok's own keys, with a codebook and without the text of TA-TiTok."""
    own = ("latent_tokens", "encoder.class_embedding", "decoder.mask_token", "quantize.embedding.weight")
    return all(key in shapes for key in own) and not any(key.startswith("decoder.text_guidance") for key in shapes)


def pixel_decoder_from_shapes(shapes: Shapes, image_size: int) -> MaskGITConfig:
    """The convolutional part of the first form."""
    levels = range(num_indices(shapes, "pixel_decoder.up."))
    widths = [shapes[f"pixel_decoder.up.{level}.block.0.conv1.weight"][0] for level in levels]
    vocab_size, code_dim = shapes["pixel_quantize.embedding.weight"]
    return MaskGITConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=num_indices(shapes, "pixel_decoder.mid."),
    )


def config_from_shapes(shapes: Shapes) -> TiTokConfig:
    """All sizes from the file; heads, normalisation of codes and groups as published (see the module's docstring)."""
    num_patches = {side: shapes[f"{side}.positional_embedding"][0] - 1 for side in ("encoder", "decoder")}
    image_size = math.isqrt(num_patches["encoder"]) * shapes["encoder.patch_embed.weight"][-1]
    first_form = "pixel_quantize.embedding.weight" in shapes
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return TiTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_tokens=shapes["latent_tokens"][0],
        encoder=transformer_from_shapes(shapes, "encoder", image_size, num_patches["encoder"]),
        decoder=transformer_from_shapes(shapes, "decoder", image_size, num_patches["decoder"]),
        l2_normalize=first_form,
        pixel_decoder=pixel_decoder_from_shapes(shapes, image_size) if first_form else None,
    )


OFFICIAL = Official(
    name="TiTok tokenizer",
    component="tokenizer",
    recognises=recognises,
    config=config_from_shapes,
)
