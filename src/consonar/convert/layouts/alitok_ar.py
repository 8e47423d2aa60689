"""Released files of AliTok's generators (arXiv 2506.05289): our keys are theirs."""

from __future__ import annotations

from consonar.convert.layouts.official import Official, Shapes
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.rotary import swiglu_width
from consonar.types import Grid


def recognises(shapes: Shapes) -> bool:
    """AliTok's generator: Llama-style blocks under reAR's names, without AdaLN."""
    needed = {"embeddings.weight", "output.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"}
    return needed <= shapes.keys()


def config_of(shapes: Shapes) -> AliTokARConfig:
    """From the shapes, which do not tell where the tokens sit: 17 and 16 x 16, as published. Codes and classes share a
    table; the rows of the output say how many are codes."""
    vocab_size, width = shapes["output.weight"]
    hidden = shapes["blocks.0.mlp.w1.weight"][0]
    return AliTokARConfig(
        width=width,
        num_layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        num_heads=width // shapes["blocks.0.attn.q_norm.weight"][0],
        ffn_width=0 if hidden == swiglu_width(width, 256) else hidden,
        vocab_size=vocab_size,
        num_tokens=273,
        num_classes=shapes["embeddings.weight"][0] - vocab_size - 2,
        grid=Grid(16, 16, prefix=17),
    )


OFFICIAL = Official("AliTok generator", "generator", recognises, config_of)
