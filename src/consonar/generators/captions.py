"""Caption features as what a generator reads, with LlamaGen's keys (arXiv 2406.06525): before the image, and pooled."""

import math
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from consonar.errors import UserError
from consonar.options import ReadOnlyWith
from consonar.types import TextCondition

CAPTIONS = ReadOnlyWith(lambda given: given.condition == "text", "{}condition 'text'")
"""Of fields that only a generator of captions reads."""


class CaptionEmbedding(nn.Module):
    """(B, P, D) from caption features (B, P, F), and the features (P, F) that stand for no caption; with `pooled` also
    what their mean is projected by."""

    uncond_embedding: Tensor

    def __init__(self, num_tokens: int, caption_dim: int, width: int, *, pooled: bool = False):
        super().__init__()
        fc1, fc2 = nn.Linear(caption_dim, width, bias=False), nn.Linear(width, width, bias=False)
        self.cap_proj = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))
        self.register_buffer("uncond_embedding", torch.zeros(num_tokens, caption_dim))
        self.pool_proj = nn.Linear(caption_dim, width) if pooled else None

    def draw_null(self, rng: torch.Generator | None) -> None:
        """Rows of length about 1."""
        null = self.uncond_embedding
        nn.init.normal_(null, std=1 / math.sqrt(null.shape[1]), generator=rng)

    def null(self, condition: Tensor | TextCondition) -> TextCondition:
        """The null caption under the mask of each caption (so the released sampler does)."""
        assert isinstance(condition, TextCondition)  # captions come to a generator of captions only
        null = self.uncond_embedding.to(condition.features.dtype)
        return replace(condition, features=null.expand_as(condition.features))

    def checked(self, condition: Tensor | TextCondition) -> Tensor:
        """Of captions with as many features as these. `UserError` for others."""
        assert isinstance(condition, TextCondition), "this generator takes captions"
        given, expected = tuple(condition.features.shape[1:]), tuple(self.uncond_embedding.shape)
        if given != expected:
            raise UserError(f"condition.features: {given} per caption, the generator takes {expected}")
        embedded: Tensor = self(condition)
        return embedded

    def forward(self, condition: TextCondition) -> Tensor:
        # Padding is hidden by the mask; zeros are what the released model was fed there.
        features = condition.features * condition.mask[:, :, None]
        return self.cap_proj(features.to(self.cap_proj.get_parameter("fc1.weight").dtype))

    def pooled(self, condition: TextCondition) -> Tensor | None:
        """(B, D): the projected mean over the tokens of each caption; None where that is not read."""
        if self.pool_proj is None:
            return None
        kept = condition.mask[:, :, None]
        mean = (condition.features * kept).sum(1) / kept.sum(1).clamp(min=1)
        pooled: Tensor = self.pool_proj(mean.to(self.pool_proj.weight.dtype))
        return pooled
