"""How a model treats the background: empty samples, and patches that turn blank under the true context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.components import load_generator
from consonar.data.tokens import TokenStore
from consonar.sampling.sample import uniforms
from consonar.seeding import choose
from consonar.types import Tokenizer

EMPTY_BELOW = 25
"""Standard deviation of an image's grey levels, of 255, below which nothing is drawn on it; emoji have over 50."""
BLANK_BELOW, BLANK_ABOVE = 10, 215
"""A patch is blank when its grey levels spread less than the one and are brighter than the other on average."""


def empty_share(samples: Path) -> float:
    """Share of the images of a sample file that are nearly one grey level, 0..1."""
    with np.load(samples) as arrays:
        grey = arrays["images"].mean(-1)  # (n, H, W)
    return float((grey.std((1, 2)) < EMPTY_BELOW).mean())


def blank_patches(images: Tensor, side: int) -> Tensor:
    """Which patches are blank: (B, side * side) bool <- (B, 3, H, W) in [-1, 1]."""
    grey = (images.clamp(-1, 1).mean(1) + 1) * 127.5
    patches = grey.unflatten(2, (side, -1)).unflatten(1, (side, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
    return (patches.std(-1) < BLANK_BELOW) & (patches.mean(-1) > BLANK_ABOVE)


@torch.inference_mode()
def patch_changes(run: Path, store: TokenStore, tokenizer: Tokenizer) -> dict[str, float]:
    """One token drawn at every place under the true context, decoded: patches that became blank, and that ceased to be.

    Shares (0..1) of the patches that are drawn, and blank, in the tokenizer's own reconstruction. Item i is drawn with
    seed i, whatever the model.
    """
    generator = load_generator(run)
    before, after = [], []
    for rows in torch.arange(len(store)).split(64):
        tokens = store.read(rows, torch.zeros_like(rows))
        logits = generator(tokens, store.labels[rows])[0].flatten(0, 1)
        drawn = choose(logits, uniforms(rows.tolist(), tokens.shape[1]).view(-1, 1)).view_as(tokens)
        assert tokenizer.grid is not None
        side = tokenizer.grid.rows
        before.append(blank_patches(tokenizer.decode(tokens), side))
        after.append(blank_patches(tokenizer.decode(drawn), side))
    blank, blank_now = torch.cat(before), torch.cat(after)
    return {
        "drawn to blank": float(blank_now[~blank].float().mean()),
        "blank to drawn": float((~blank_now)[blank].float().mean()),
    }
