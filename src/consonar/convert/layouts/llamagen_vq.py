"""Released files of LlamaGen's VQ tokenizers (arXiv 2406.06525): `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, `vq_ds16_t2i.pt`.

Our keys are theirs but for `quantize.codebook_used`, a buffer of their log of code usage, which is set aside. What the
shapes cannot say, as published: l2-normalised codes, 32 groups, images of 256 pixels (the network reads any multiple
of its reduction; `image_size` of `convert` says another).
"""

from __future__ import annotations

from consonar.convert.layouts.official import Official, Shapes, num_indices, set_aside
from consonar.tokenizers.vq import VQConfig

UNUSED = "quantize.codebook_used"
MARKERS = {
    "encoder.conv_blocks.0.res.0.norm1.weight",
    "quantize.embedding.weight",
    "quant_conv.weight",
    "post_quant_conv.weight",
}


def config_from_shapes(shapes: Shapes) -> VQConfig:
    base = shapes["encoder.conv_in.weight"][0]
    levels = range(num_indices(shapes, "encoder.conv_blocks."))
    widths = [shapes[f"encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in levels]
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return VQConfig(
        image_size=256,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=num_indices(shapes, "encoder.conv_blocks.0.res."),
        latent_channels=shapes["encoder.conv_out.weight"][0],
    )


OFFICIAL = Official(
    name="LlamaGen VQ tokenizer",
    component="tokenizer",
    recognises=lambda shapes: set(shapes) >= MARKERS,
    config=config_from_shapes,
    to_ours=set_aside(lambda key: key == UNUSED),
)
