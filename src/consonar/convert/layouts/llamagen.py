"""Released files of LlamaGen (arXiv 2406.06525): VQ tokenizers (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, `vq_ds16_t2i.pt`)
and generators, for classes and for captions. Our keys are theirs but for what is set aside: the tokenizer's log of code
usage, a buffer, and the cache of a generator that was saved after sampling.

What the shapes cannot say, as published. Tokenizers: l2-normalised codes, 32 groups, images of 256 pixels (the network
reads any multiple of its reduction; `image_size` of `convert` says another). Generators: the number of heads (that of
the width, else heads of 64), images of 256 pixels in 16 x 16 tokens (grid and num_tokens are others for 384 and 512),
and a null class.
"""

import re
from dataclasses import replace

from consonar.convert.layouts.official import Official, Shapes, has, multipliers, num_indices, set_aside
from consonar.generators.llamagen import LLAMAGEN_PRESETS, LlamaGenConfig
from consonar.generators.rotary import swiglu_width
from consonar.tokenizers.vq import VQConfig
from consonar.types import Grid

CODE_USAGE = "quantize.codebook_used"
KV_CACHE = re.compile(r"layers\.\d+\.attention\.kv_cache\.[kv]_cache")


def tokenizer_config(shapes: Shapes) -> VQConfig:
    base = shapes["encoder.conv_in.weight"][0]
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return VQConfig(
        image_size=256,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base,
        channel_multipliers=multipliers(shapes, "encoder.conv_blocks.", "res.0.conv1.weight", base),
        num_res_blocks=num_indices(shapes, "encoder.conv_blocks.0.res."),
        latent_channels=shapes["encoder.conv_out.weight"][0],
    )


def is_generator(shapes: Shapes) -> bool:
    needed = {"tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight", "norm.weight"}
    conditions = {"cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"}
    return needed <= shapes.keys() and bool(conditions & shapes.keys())


def generator_config(shapes: Shapes) -> LlamaGenConfig:
    vocab_size, width = shapes["tok_embeddings.weight"]
    published = {preset.width: preset.num_heads for preset in LLAMAGEN_PRESETS.values()}
    num_heads = published.get(width, 1 if width % 64 else width // 64)
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    head_dim, rows = width // num_heads, shapes["layers.0.attention.wqkv.weight"][0]
    num_key_heads = (rows - width) // (2 * head_dim)
    config = LlamaGenConfig(
        width=width,
        num_layers=num_indices(shapes, "layers."),
        num_heads=num_heads,
        num_kv_heads=0 if num_key_heads == num_heads else num_key_heads,
        ffn_width=0 if hidden == swiglu_width(width, 256) else hidden,
        vocab_size=vocab_size,
        num_tokens=256,
        grid=Grid(16, 16),
    )
    classes = shapes.get("cls_embedding.embedding_table.weight")
    if classes:
        return replace(config, num_classes=classes[0] - 1)
    num_condition_tokens, caption_dim = shapes["cls_embedding.uncond_embedding"]
    return replace(config, condition="text", num_condition_tokens=num_condition_tokens, caption_dim=caption_dim)


TOKENIZER = Official(
    "LlamaGen VQ tokenizer",
    "tokenizer",
    has("encoder.conv_blocks.0.res.0.norm1.weight", "quantize.embedding.weight", "quant_conv.weight",
        "post_quant_conv.weight"),
    tokenizer_config,
    set_aside(lambda key: key == CODE_USAGE),
)  # fmt: skip
GENERATOR = Official(
    "LlamaGen generator",
    "generator",
    is_generator,
    generator_config,
    set_aside(lambda key: bool(KV_CACHE.fullmatch(key))),
)
