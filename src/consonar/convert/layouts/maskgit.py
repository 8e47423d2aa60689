"""Released files of MaskGIT's tokenizer, `maskgit-vqgan-imagenet-f16-256.bin`: our keys are theirs.

Files do not tell the image size and the number of groups: 256 and 32, as published.
"""

from consonar.convert.layouts.official import Official, Shapes, has, multipliers, num_indices
from consonar.tokenizers.maskgit import MaskGITConfig


def config_from_shapes(shapes: Shapes) -> MaskGITConfig:
    base_channels = shapes["encoder.conv_in.weight"][0]
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return MaskGITConfig(
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=multipliers(shapes, "encoder.down.", "block.0.conv2.weight", base_channels),
        num_res_blocks=num_indices(shapes, "encoder.mid."),
    )


# VQGAN of taming-transformers shares the names of the levels, but not those of the middle.
OFFICIAL = Official(
    "MaskGIT-VQGAN tokenizer",
    "tokenizer",
    has("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight", "decoder.up.0.block.0.conv1.weight",
        "quantize.embedding.weight"),
    config_from_shapes,
)  # fmt: skip
