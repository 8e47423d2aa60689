"""Released files of MaskGIT's tokenizer, `maskgit-vqgan-imagenet-f16-256.bin`: our keys are theirs.

Files do not tell the image size and the number of groups: 256 and 32, as published.
"""

from __future__ import annotations

from consonar.convert.layouts.official import Official, Shapes, num_indices
from consonar.tokenizers.maskgit import MaskGITConfig

# VQGAN of taming-transformers shares the names of the levels, but not those of the middle.
MARKERS = {
    "encoder.down.0.block.0.conv1.weight",
    "encoder.mid.0.conv1.weight",
    "decoder.up.0.block.0.conv1.weight",
    "quantize.embedding.weight",
}


def config_from(shapes: Shapes) -> MaskGITConfig:
    """Sizes from the shapes; image size and groups as published."""
    base_channels = shapes["encoder.conv_in.weight"][0]
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return MaskGITConfig(
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=tuple(
            shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] // base_channels
            for level in range(num_indices(shapes, "encoder.down."))
        ),
        num_res_blocks=num_indices(shapes, "encoder.mid."),
    )


OFFICIAL = Official(
    name="MaskGIT-VQGAN tokenizer",
    component="tokenizer",
    recognises=lambda shapes: shapes.keys() >= MARKERS,
    config=config_from,
)
