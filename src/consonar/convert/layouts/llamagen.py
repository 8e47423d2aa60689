"""Released files of LlamaGen's generators (arXiv 2406.06525), for classes and for captions: our keys are theirs."""

from __future__ import annotations

import re
from dataclasses import replace

from consonar.convert.layouts.official import Official, Shapes, set_aside
from consonar.generators.llamagen import LLAMAGEN_PRESETS, LlamaGenConfig
from consonar.generators.rotary import swiglu_width
from consonar.types import Grid


def recognises(shapes: Shapes) -> bool:
    """LlamaGen's transformer, for classes or captions."""
    needed = {"tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight", "norm.weight"}
    embedding = {"cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"}
    return needed <= shapes.keys() and bool(embedding & shapes.keys())


def config_of(shapes: Shapes) -> LlamaGenConfig:
    """From the shapes. They tell neither heads (the published number of the width, else heads of 64) nor image size
    (256 px in 16 x 16 tokens: `replace` grid and num_tokens for 384 and 512), and the null class is taken to exist."""
    vocab_size, width = shapes["tok_embeddings.weight"]
    published = {preset.width: preset.num_heads for preset in LLAMAGEN_PRESETS.values()}
    num_heads = published.get(width, 1 if width % 64 else width // 64)
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    head_dim, rows = width // num_heads, shapes["layers.0.attention.wqkv.weight"][0]
    num_key_heads = (rows - width) // (2 * head_dim)
    config = LlamaGenConfig(
        width=width,
        num_layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers.")),
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


# The released sampler leaves its cache in the module, hence in files saved after sampling.
CACHE_KEY = re.compile(r"layers\.\d+\.attention\.kv_cache\.[kv]_cache")


OFFICIAL = Official(
    "LlamaGen generator", "generator", recognises, config_of, set_aside(lambda key: bool(CACHE_KEY.fullmatch(key)))
)
