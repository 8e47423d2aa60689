"""Released files of generators: reAR (arXiv 2510.04450) and RAR (arXiv 2411.00776), which are one architecture;
LlamaGen (arXiv 2406.06525), for classes and for captions; AliTok (arXiv 2506.05289). Our keys are theirs but for what
is set aside: the two alignment heads of reAR's training, which no sampling needs, and the cache of a LlamaGen generator
that was saved after sampling.

What the shapes cannot say, as published. reAR: dropout, 0.1. LlamaGen: the number of heads (that of the width, else
heads of 64), images of 256 pixels in 16 x 16 tokens (grid and num_tokens are others for 384 and 512), and a null class.
AliTok: where the tokens sit, 17 and 16 x 16.
"""

import math
import re
from dataclasses import replace

from consonar.convert.layouts.official import Official, Shapes, State, has, num_indices, set_aside
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.llamagen import LLAMAGEN_PRESETS, LlamaGenConfig
from consonar.generators.rear import SPARE_POSITIONS, ReARConfig
from consonar.generators.rotary import swiglu_width
from consonar.types import Grid

# Three linear maps with SiLU between them, each.
HEADS = [
    {f"{side}_align_mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    for side in ("encode", "decode")
]
KV_CACHE = re.compile(r"layers\.\d+\.attention\.kv_cache\.[kv]_cache")


def rear_config(shapes: Shapes) -> ReARConfig:
    vocab_size, width = shapes["lm_head.weight"]
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    ratio = hidden / width
    # The model takes the whole part of width * ratio: a quotient rounded down would lose a unit.
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ReARConfig(
        width=width,
        num_layers=num_indices(shapes, "blocks."),
        num_heads=width // shapes["blocks.0.attn.q_norm.weight"][0],
        mlp_ratio=ratio,
        vocab_size=vocab_size,
        num_tokens=shapes["pos_embed"][1] - SPARE_POSITIONS,
        # One row each for the mask and the null class.
        num_classes=shapes["embeddings.weight"][0] - vocab_size - 2,
    )


def rear_to_ours(official: State, config: ReARConfig) -> tuple[State, State]:
    """The heads set aside; one that is not whole stays, and is refused as unknown."""
    whole = set().union(*(head for head in HEADS if head <= official.keys()))
    return set_aside(lambda key: key in whole)(official, config)


def is_llamagen(shapes: Shapes) -> bool:
    needed = {"tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight", "norm.weight"}
    conditions = {"cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"}
    return needed <= shapes.keys() and bool(conditions & shapes.keys())


def llamagen_config(shapes: Shapes) -> LlamaGenConfig:
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


def alitok_config(shapes: Shapes) -> AliTokARConfig:
    """Codes and classes share a table; the rows of the output say how many are codes."""
    vocab_size, width = shapes["output.weight"]
    hidden = shapes["blocks.0.mlp.w1.weight"][0]
    return AliTokARConfig(
        width=width,
        num_layers=num_indices(shapes, "blocks."),
        num_heads=width // shapes["blocks.0.attn.q_norm.weight"][0],
        ffn_width=0 if hidden == swiglu_width(width, 256) else hidden,
        vocab_size=vocab_size,
        num_tokens=273,
        num_classes=shapes["embeddings.weight"][0] - vocab_size - 2,
        grid=Grid(16, 16, prefix=17),
    )


REAR = Official(
    "reAR/RAR generator",
    "generator",
    has("target_aware_pos_embed", "adaln_before_head.adaLN_modulation.1.weight"),
    rear_config,
    rear_to_ours,
)
LLAMAGEN = Official(
    "LlamaGen generator",
    "generator",
    is_llamagen,
    llamagen_config,
    set_aside(lambda key: bool(KV_CACHE.fullmatch(key))),
)
# Llama-style blocks under reAR's names, without AdaLN.
ALITOK = Official(
    "AliTok generator",
    "generator",
    has("embeddings.weight", "output.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"),
    alitok_config,
)
