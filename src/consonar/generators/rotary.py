"""What LlamaGen (arXiv 2406.06525) and AliTok's generator (arXiv 2506.05289) share: RMSNorm, SwiGLU, rotary positions
(RoFormer, arXiv 2104.09864) on a line or a grid, their shape and forward pass; their blocks differ.

Facts kept from the released code: rotary pairs are neighbours (2i, 2i + 1); on a grid the first half of the pairs turns
with the row, the second half with the column; the rows of the table that belong to the condition are zero, not the
identity, so queries and keys of condition tokens vanish and every image token gives all of them the score 0; rotation
and RMSNorm run in float32, the norm's weight is applied after the cast back.

The table of positions is not part of the weights but follows from `grid`, so that weights trained at one resolution
load at another.

Letters: `B` batch, `n` new positions, `N` tokens, `V` codes, `D` width, `P` condition tokens, `E` width of one head.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import KVCache, attention_mask
from consonar.errors import UserError
from consonar.float32 import product_in_float32
from consonar.generators.base import CausalGenerator, GeneratorConfig, Given
from consonar.options import SMALLEST, Count, CountOrZero, Depth, Divides, Positive, Range, ReadOnlyWith, ShareBelowOne
from consonar.seeding import draw_weights
from consonar.types import Grid

Heads = Annotated[Count, Divides("width", 4, into="heads of a multiple of 4")]
ROUNDED_WIDTH = ReadOnlyWith(lambda given: given.ffn_width == 0, "{}ffn_width 0")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def swiglu_width(width: int, multiple_of: int) -> int:
    """8/3 of `width`, so that three matrices cost what two of 4 `width` do, rounded up to a multiple."""
    return -(8 * width // 3 // -multiple_of) * multiple_of


@lru_cache(maxsize=16)
def inverse_frequencies(num_pairs: int, base: float, device: torch.device) -> Tensor:
    """base^(-i / num_pairs): (num_pairs,) float32."""
    # A table made while sampling serves training too, where autograd refuses tensors of inference mode.
    with torch.inference_mode(False):
        return (1.0 / base ** (torch.arange(num_pairs, dtype=torch.float32) / num_pairs)).to(device)


def rotary_angles(positions: Tensor, num_pairs: int, base: float) -> Tensor:
    """positions * base^(-i / num_pairs) for pair i: (..., num_pairs) float32 <- (...)."""
    return positions[..., None].float() * inverse_frequencies(num_pairs, base, positions.device)


@lru_cache(maxsize=64)
def rotary_table(
    head_dim: int, num_condition_tokens: int, num_tokens: int, grid: Grid | None, base: float, device: torch.device
) -> Tensor:
    """(P + N, head_dim / 2, 2) float32, cosine and sine of every position's angles; zeros for the condition.

    Tokens without a place (all of them where `grid` is None, else its prefix) have positions 0, 1, ... on a line; rows
    and columns of a grid are counted on from there, as in AliTok (without a prefix: from 0, as in LlamaGen).
    """
    with torch.inference_mode(False), torch.no_grad():  # see `inverse_frequencies`
        num_on_line = num_tokens if grid is None else grid.prefix
        angles = rotary_angles(torch.arange(num_on_line), head_dim // 2, base)
        if grid is not None:
            rows = rotary_angles(grid.prefix + torch.arange(grid.rows), head_dim // 4, base)
            columns = rotary_angles(grid.prefix + torch.arange(grid.columns), head_dim // 4, base)
            places = [rows.repeat_interleave(grid.columns, 0), columns.repeat(grid.rows, 1)]
            angles = torch.cat([angles, torch.cat(places, -1)])  # (N, head_dim / 2)
        table = torch.stack([angles.cos(), angles.sin()], -1)
        return torch.cat([table.new_zeros(num_condition_tokens, *table.shape[1:]), table]).to(device)


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(GeneratorConfig):
    """Shape of a generator with rotary positions. Recipes leave the last four at 0 and None: set by the data."""

    num_layers: Depth = 12
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
    """A subclass makes `blocks`, which need the table of positions, the modules declared here, and what embeds."""

    config: RotaryConfig
    norm: RMSNorm
    output: nn.Linear
    token_dropout: nn.Dropout

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, n, D) <- (B, n) int64."""

    @abstractmethod
    def embed_condition(self, condition: Given) -> Tensor:
        """(B, P, D)."""

    def kept_positions(self, condition: Given) -> Tensor | None:
        """Which of the P condition tokens are no padding, (B, P) bool; None: all."""
        return None

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Normals of std 0.02; norms 1; biases and the output 0, so that the first prediction is uniform."""
        draw_weights(self, nn.init.normal_, rng)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.output.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return product_in_float32(self.output, hidden)

    def rotary_table(self, device: torch.device) -> Tensor:
        """(P + N, head width / 2, 2) of this shape."""
        config, head_dim = self.config, self.width // self.config.num_heads
        return rotary_table(head_dim, self.prefix_length, self.num_tokens, config.grid, config.rope_base, device)

    def hidden_states(
        self, context: Tensor, condition: Given, *, cache: KVCache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        x = self.embed_tokens(context)
        if cache is None or cache.read == 0:
            x = torch.cat([self.embed_condition(condition), x], 1)
        x = self.token_dropout(x)
        count, table = x.shape[1], self.rotary_table(x.device)
        assert count <= len(table), f"generator of {len(table)} positions asked to hold {count}"
        if cache is None:
            table = table[:count]
        else:
            cache.tables = cache.tables or (table,)
            table = cache.tables[0][cache.places(count)]
        mask = attention_mask(count, self.kept_positions(condition), cache, x.device)
        x, taps = self.run_blocks(x, table, mask, cache, tap_layers)
        return self.norm(x), taps
