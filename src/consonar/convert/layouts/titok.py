"""Released files of TiTok (arXiv 2406.07550): our keys are theirs.

Files do not tell whether codes are normalised: the first form's are, the second's are not, as published. They do not
tell the pixel decoder's groups either: 32, as published.
"""

import math

from consonar.convert.layouts.official import Official, Shapes, has, multipliers, num_indices, transformer
from consonar.tokenizers.maskgit import MaskGITConfig
from consonar.tokenizers.titok import TiTokConfig


def pixel_decoder_config(shapes: Shapes, image_size: int) -> MaskGITConfig:
    """The convolutional part of the first form."""
    base_channels = shapes["pixel_decoder.up.0.block.0.conv1.weight"][0]
    vocab_size, code_dim = shapes["pixel_quantize.embedding.weight"]
    return MaskGITConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=multipliers(shapes, "pixel_decoder.up.", "block.0.conv1.weight", base_channels),
        num_res_blocks=num_indices(shapes, "pixel_decoder.mid."),
    )


def config_from_shapes(shapes: Shapes) -> TiTokConfig:
    num_patches = {side: shapes[f"{side}.positional_embedding"][0] - 1 for side in ("encoder", "decoder")}
    image_size = math.isqrt(num_patches["encoder"]) * shapes["encoder.patch_embed.weight"][-1]
    first_form = "pixel_quantize.embedding.weight" in shapes
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return TiTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_tokens=shapes["latent_tokens"][0],
        encoder=transformer(shapes, "encoder", image_size, num_patches["encoder"]),
        decoder=transformer(shapes, "decoder", image_size, num_patches["decoder"]),
        l2_normalize=first_form,
        pixel_decoder=pixel_decoder_config(shapes, image_size) if first_form else None,
    )


# With a codebook, and without the text of TA-TiTok.
OFFICIAL = Official(
    "TiTok tokenizer",
    "tokenizer",
    has("latent_tokens", "encoder.class_embedding", "decoder.mask_token", "quantize.embedding.weight",
        without=("decoder.text_guidance",)),
    config_from_shapes,
)  # fmt: skip
