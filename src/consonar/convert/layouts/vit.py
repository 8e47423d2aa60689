"""What the files of the transformers of TiTok and AliTok say of their sizes."""

from __future__ import annotations

import math

from consonar.convert.layouts.official import Shapes, num_indices
from consonar.tokenizers.vit import TransformerConfig

PUBLISHED_HEAD_WIDTH = 64


def transformer_from_shapes(shapes: Shapes, side: str, image_size: int, num_patches: int) -> TransformerConfig:
    """The sizes of `encoder` or `decoder`, whichever `side` names, that cuts the image into `num_patches`."""
    width = shapes[f"{side}.ln_post.weight"][0]
    return TransformerConfig(
        width=width,
        num_layers=num_indices(shapes, f"{side}.transformer."),
        num_heads=max(1, width // PUBLISHED_HEAD_WIDTH),
        patch_size=image_size // math.isqrt(num_patches),
    )
