"""Released files of reAR (arXiv 2510.04450) and RAR (arXiv 2411.00776): one architecture, our keys are theirs.

A reAR file also holds the two alignment heads of its training, which no sampling needs: they are set aside. What the
shapes cannot say: dropout, 0.1 as published. All other sizes, heads included, follow from shapes.
"""

import math

from consonar.convert.layouts.official import Official, Shapes, State, has, num_indices, set_aside
from consonar.generators.rear import SPARE_POSITIONS, ReARConfig

# Three linear maps with SiLU between them, each.
HEADS = [
    {f"{side}_align_mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    for side in ("encode", "decode")
]


def config_from_shapes(shapes: Shapes) -> ReARConfig:
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


def to_ours(official: State, config: ReARConfig) -> tuple[State, State]:
    """The heads set aside; one that is not whole stays, and is refused as unknown."""
    whole = set().union(*(head for head in HEADS if head <= official.keys()))
    return set_aside(lambda key: key in whole)(official, config)


OFFICIAL = Official(
    "reAR/RAR generator",
    "generator",
    has("target_aware_pos_embed", "adaln_before_head.adaLN_modulation.1.weight"),
    config_from_shapes,
    to_ours,
)
