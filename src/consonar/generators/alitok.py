"""The autoregressive model of AliTok (arXiv 2506.05289), a Llama-style transformer in reAR's vocabulary.

State-dict keys are those of the released checkpoints, so that released weights load without renaming. Facts kept from
them: one embedding table for codes, an unused row, the classes and the null class, in this order; sequence [condition,
17 prefix tokens, 256 grid tokens], where the prefix has positions 0 .. 16 on a line and the grid rows and columns
17 .. 32 (`rotary_table`); queries and keys are RMS-normalised per head before they are turned; biases in
attention and output but not in the SwiGLU; RMSNorm eps 1e-5.

Deviations: the table of positions follows from the grid of the tokens (released: 17 + 16 x 16, hard-coded); the unused
row serves as the mask of `corruption: mask`, as in reAR; condition dropout belongs to the objective.

Letters: `B` batch, `n` new positions, `N` tokens, `V` codes, `D` width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from consonar.attention import KVCache, NormedAttention
from consonar.generators.rotary import Heads, RMSNorm, RotaryConfig, RotaryGenerator, SwiGLU
from consonar.options import Depth, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class AliTokARConfig(RotaryConfig):
    """Shape of an AliTok generator."""

    kind: Literal["alitok-ar"] = "alitok-ar"
    num_layers: Depth = 24
    """Transformer blocks."""
    num_heads: Heads = 16
    """Attention heads; cuts `width` into heads of a multiple of 4."""
    attention_dropout: ShareBelowOne = 0.1
    """Dropout on the attention weights."""


ALITOK_PRESETS = {
    "B": AliTokARConfig(width=768, num_layers=24),
    "L": AliTokARConfig(width=1024, num_layers=24),
    "XL": AliTokARConfig(width=1280, num_layers=32),
}
"""Published sizes."""


class Block(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: AliTokARConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        norm = partial(RMSNorm, eps=config.norm_eps)
        self.attn = NormedAttention(config.width, config.num_heads, config.attention_dropout, norm)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden_units, config.ffn_dropout)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """x (B, n, D) -> (B, n, D)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask, cache, layer, table))
        return x + self.mlp(self.norm2(x))


class AliTokARGenerator(RotaryGenerator[Tensor]):
    config: AliTokARConfig

    def __init__(self, config: AliTokARConfig):
        super().__init__(config, config.num_classes)
        self.mask_token = config.vocab_size
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size)
        self.reset_parameters()

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens)

    def embed_condition(self, condition: Tensor) -> Tensor:
        return self.embeddings(condition + self.vocab_size + 1)[:, None]
