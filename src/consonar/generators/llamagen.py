"""The Llama-style transformer of LlamaGen (arXiv 2406.06525), conditioned on a class or on caption features.

State-dict keys are those of the released checkpoints, so that released weights load without renaming. Facts kept from
them: no biases; SwiGLU of 8/3 the width rounded up to a multiple of 256; RMSNorm eps 1e-5; one table row per class and
one for the null class; caption features go through two linear maps with a tanh GELU; the tables of positions are zero
at the condition (`rotary`); padded caption columns are hidden from everybody but themselves, under guidance for the
null captions too; the null caption (`uncond_embedding`) is drawn once and not trained: a buffer here as there.

Deviations: logits are aligned and of one shape in both modes (released: sliced when training, whole otherwise); the
last token is read in training, no logits are made from it; condition dropout belongs to the objective; no stochastic
depth, which no released model used; the cache holds as many heads of keys as there are (released: fails when fewer).

Letters: `B` batch, `n` new positions, `N` tokens, `V` codes, `D` width, `P` condition tokens, `F` width of a caption
feature.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from consonar.attention import CausalAttention, KVCache, rotate
from consonar.errors import UserError
from consonar.generators.captions import CAPTIONS, CaptionEmbedding
from consonar.generators.rotary import RMSNorm, RotaryConfig, RotaryGenerator, SwiGLU
from consonar.options import Count, CountOrZero, Divides
from consonar.types import TextCondition


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(RotaryConfig):
    """Shape of a LlamaGen generator."""

    kind: Literal["llamagen"] = "llamagen"
    condition: Literal["class", "text"] = "class"
    """What it is conditioned on: a class id, or the features of a caption."""
    caption_dim: Annotated[Count, CAPTIONS] = 2048
    """Width of a caption feature (text only)."""
    num_condition_tokens: CountOrZero = 0
    """Positions of the condition; 0: 1 for a class, 120 for text."""
    num_kv_heads: Annotated[CountOrZero, Divides("num_heads")] = 0
    """Heads of keys and values, shared by neighbouring heads of queries; 0: as many as `num_heads`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition == "class" and self.num_condition_tokens > 1:
            raise UserError(f"model.num_condition_tokens: {self.num_condition_tokens}, but a class has 1 position")
        if self.condition == "text" and self.num_classes:
            raise UserError(f"model.num_classes: {self.num_classes}, but model.condition is text, which has none")

    @property
    def has_classes(self) -> bool:
        return self.condition == "class"

    @property
    def caption_shape(self) -> tuple[int, int]:
        return self.prefix_length, self.caption_dim

    @property
    def prefix_length(self) -> int:
        return self.num_condition_tokens or {"class": 1, "text": 120}[self.condition]

    @property
    def num_key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


LLAMAGEN_PRESETS = {
    "B": LlamaGenConfig(width=768, num_layers=12, num_heads=12),
    "L": LlamaGenConfig(width=1024, num_layers=24, num_heads=16),
    "XL": LlamaGenConfig(width=1280, num_layers=36, num_heads=20),
    "XXL": LlamaGenConfig(width=1536, num_layers=48, num_heads=24),
    "XXXL": LlamaGenConfig(width=2560, num_layers=48, num_heads=40),
    "3B": LlamaGenConfig(width=3200, num_layers=24, num_heads=32),
}
"""Published sizes, for classes; `replace(preset, condition="text")` for captions."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries, keys and values from one product."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.num_heads, self.num_key_heads = config.num_heads, config.num_key_heads
        self.head_dim, self.dropout = config.width // config.num_heads, config.attention_dropout
        self.wqkv = nn.Linear(config.width, (self.num_heads + 2 * self.num_key_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.attend = CausalAttention()

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads of q, k, v, n, width)
        turned, v = heads.split([self.num_heads + self.num_key_heads, self.num_key_heads], 1)
        q, k = rotate(turned, table).split([self.num_heads, self.num_key_heads], 1)
        dropout = self.dropout if self.training else 0.0
        return self.wo(self.attend(q, k, v, mask=mask, cache=cache, layer=layer, dropout=dropout))


class Block(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = SwiGLU(config.width, config.hidden_units, config.ffn_dropout)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """x (B, n, D) -> (B, n, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), table, mask, cache, layer))
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGenGenerator(RotaryGenerator[Tensor | TextCondition]):
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config, config.num_classes)
        self.cls_embedding: CaptionEmbedding | nn.ModuleDict
        if config.condition == "class":  # the null class is the last row
            self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        else:
            self.cls_embedding = CaptionEmbedding(config.prefix_length, config.caption_dim, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The released name of the list is `layers`."""
        return self.layers

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """As `RotaryGenerator.reset_parameters`; the null caption has rows of length about 1."""
        super().reset_parameters(rng)
        if isinstance(self.cls_embedding, CaptionEmbedding):
            self.cls_embedding.draw_null(rng)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.tok_embeddings(tokens)

    def embed_condition(self, condition: Tensor | TextCondition) -> Tensor:
        if isinstance(self.cls_embedding, nn.ModuleDict):
            return self.cls_embedding["embedding_table"](condition)[:, None]
        return self.cls_embedding.checked(condition)

    def kept_positions(self, condition: Tensor | TextCondition) -> Tensor | None:
        return condition.mask if isinstance(condition, TextCondition) else None

    def null_condition(self, condition: Tensor | TextCondition) -> Tensor | TextCondition:
        """The null class, or the null caption."""
        if isinstance(self.cls_embedding, CaptionEmbedding):
            return self.cls_embedding.null(condition)
        return super().null_condition(condition)
