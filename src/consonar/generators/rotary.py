"""The shape and the forward pass that LlamaGen and AliTok's generator share; their blocks differ.

The table of positions is not part of the weights but follows from `grid`, so that weights trained at one resolution
load at another.

Letters: `B` batch, `n` new tokens, `N` tokens, `V` codes, `D` width, `P` condition tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from consonar.attention import KVCache, attention_mask
from consonar.errors import UserError
from consonar.generators.base import CausalConfig, CausalGenerator, Given
from consonar.generators.layers import RMSNorm, rotary_table, swiglu_width
from consonar.options import SMALLEST, Count, CountOrZero, Divides, Positive, Range, ReadOnlyWith, ShareBelowOne
from consonar.types import Grid

Heads = Annotated[Count, Divides("width", 4, into="heads of a multiple of 4")]
ROUNDED_WIDTH = ReadOnlyWith(lambda given: given.ffn_width == 0, "{}ffn_width 0")


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(CausalConfig):
    """Shape of a generator with rotary positions. Recipes leave the last four at 0 and None: set by the data."""

    width: Count = 768
    """Hidden size."""
    num_layers: Count = 12
    """Transformer blocks."""
    num_heads: Heads = 12
    """Attention heads; cuts `width` into heads of a multiple of 4."""
    multiple_of: Annotated[Count, ROUNDED_WIDTH] = 256
    """The SwiGLU has 8/3 `width` hidden units, rounded up to a multiple of this."""
    ffn_width: CountOrZero = 0
    """Hidden units of the SwiGLU; 0: by `multiple_of`."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in every RMSNorm."""
    rope_base: Annotated[float, Range(SMALLEST, 1e12)] = 10000.0
    """Base of the rotary wavelengths."""
    token_dropout: ShareBelowOne = 0.1
    """Dropout on the embeddings of condition and tokens."""
    attention_dropout: ShareBelowOne = 0.0
    """Dropout on the attention weights."""
    residual_dropout: ShareBelowOne = 0.1
    """Dropout after attention."""
    ffn_dropout: ShareBelowOne = 0.1
    """Dropout after the SwiGLU."""
    num_classes: CountOrZero = 0
    """Classes; 0: taken from the token store, or none."""
    grid: Grid | None = None
    """Where the tokens sit; None: taken from the token store, and without a grid there, on a line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None and self.num_tokens not in (0, self.grid.num_tokens):
            raise UserError(f"model.num_tokens: {self.num_tokens}, but model.grid has {self.grid.num_tokens} places")

    @property
    def hidden_units(self) -> int:
        """Of the SwiGLU."""
        return self.ffn_width or swiglu_width(self.width, self.multiple_of)


class RotaryGenerator(CausalGenerator[Given]):
    """Follows `consonar.types.Generator`.

    A subclass makes `blocks`, which need the table of positions, the modules declared here, and the methods that tell
    what conditions and tokens are.
    """

    config: RotaryConfig
    norm: RMSNorm
    output: nn.Linear
    token_dropout: nn.Dropout

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, n, D) <- (B, n) int64."""
        ...

    @abstractmethod
    def embed_condition(self, condition: Given) -> Tensor:
        """(B, P, D)."""
        ...

    @abstractmethod
    def kept_positions(self, condition: Given) -> Tensor | None:
        """Which of the P condition tokens are no padding, (B, P) bool; None: all."""
        ...

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Normals of std 0.02; norms 1; biases and the output 0, so that the first prediction is uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=rng)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.output.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def rotary_table(self, device: torch.device) -> Tensor:
        """(P + N, head width / 2, 2) of this shape."""
        config = self.config
        head_dim = self.width // config.num_heads
        return rotary_table(head_dim, self.prefix_length, self.num_tokens, config.grid, config.rope_base, device)

    def hidden_states(
        self, context: Tensor, condition: Given, *, cache: KVCache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        start = cache.length if cache is not None else 0
        x = self.embed_tokens(context)
        if start == 0:
            x = torch.cat([self.embed_condition(condition), x], 1)
        x = self.token_dropout(x)
        end, length = start + x.shape[1], self.prefix_length + self.num_tokens
        assert end <= length, f"generator of {length} positions asked to hold {end}"
        kept = self.kept_positions(condition)
        mask = attention_mask(end - start, end, kept, cached=cache is not None, device=x.device)
        table = self.rotary_table(x.device)[start:end]
        x, taps = self.run_blocks(x, table, mask, cache, tap_layers)
        return self.norm(x), taps
