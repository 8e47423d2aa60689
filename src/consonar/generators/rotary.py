"""The shape and the forward pass that LlamaGen and AliTok's generator share; their blocks differ.

Sequence [condition, token 0, token 1, ...], causal; hidden state P - 1 + i predicts token i. The table of positions is
not part of the weights but follows from `grid`, so that weights trained at one resolution load at another.

Letters: `B` batch, `n` new tokens, `N` tokens, `V` codes, `D` width, `P` condition tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from consonar.attention import KVCache, attention_mask
from consonar.errors import UserError
from consonar.generators.layers import RMSNorm, rotary_table, swiglu_width
from consonar.options import check_options
from consonar.origin import Origin
from consonar.types import GeneratorConfig, Grid

SIZES = ("vocab_size", "num_tokens", "num_classes")


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(GeneratorConfig):
    """Shape of a generator with rotary positions. Recipes leave the last four at 0 and None: set by the data."""

    width: int = 768
    """Hidden size."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads; cuts `width` into heads of a multiple of 4."""
    multiple_of: int = 256
    """The SwiGLU has 8/3 `width` hidden units, rounded up to a multiple of this."""
    ffn_width: int = 0
    """Hidden units of the SwiGLU; 0: by `multiple_of`."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths."""
    token_dropout: float = 0.1
    """Dropout on the embeddings of condition and tokens."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights."""
    residual_dropout: float = 0.1
    """Dropout after attention."""
    ffn_dropout: float = 0.1
    """Dropout after the SwiGLU."""
    num_classes: int = 0
    """Classes; 0: taken from the token store, or none."""
    grid: Grid | None = None
    """Where the tokens sit; None: taken from the token store, and without a grid there, on a line."""

    def __post_init__(self) -> None:
        check_options(self, "model.")
        for key in ("width", "num_layers", "num_heads", "multiple_of", "norm_eps", "rope_base"):
            if getattr(self, key) <= 0:
                raise UserError(f"model.{key}: {getattr(self, key)} is not positive")
        for key in ("ffn_width", *SIZES):
            if getattr(self, key) < 0:
                raise UserError(f"model.{key}: {getattr(self, key)} is negative")
        if self.width % (4 * self.num_heads):
            raise UserError(
                f"model.num_heads: {self.num_heads} does not cut model.width {self.width} into heads of a multiple of 4"
            )
        for key in (item.name for item in fields(self) if item.name.endswith("dropout")):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"model.{key}: {getattr(self, key)} is not in [0, 1)")
        if self.grid is not None and self.num_tokens not in (0, self.grid.num_tokens):
            raise UserError(f"model.num_tokens: {self.num_tokens}, but model.grid has {self.grid.num_tokens} places")

    @property
    def needed_sizes(self) -> tuple[str, ...]:
        """Fields that a generator cannot be built without."""
        return SIZES

    @property
    def prefix_length(self) -> int:
        """P."""
        return 1

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    @property
    def hidden_units(self) -> int:
        """Of the SwiGLU."""
        return self.ffn_width or swiglu_width(self.width, self.multiple_of)

    def sized(self, vocab_size: int, num_tokens: int, num_classes: int, grid: Grid | None = None) -> Self:
        """This shape for given data; raises `UserError` when a size was set to something else."""
        sizes = {"vocab_size": vocab_size, "num_tokens": num_tokens, "num_classes": num_classes}
        for key, size in sizes.items():
            if getattr(self, key) not in (0, size):
                raise UserError(f"model.{key}: {getattr(self, key)}, but the token store has {size}")
        if self.grid not in (None, grid):
            raise UserError(f"model.grid: {self.grid}, but the tokens of the store sit on {grid}")
        return replace(self, vocab_size=vocab_size, num_tokens=num_tokens, num_classes=num_classes, grid=grid)


class RotaryGenerator(nn.Module, ABC):
    """Follows `consonar.types.Generator`.

    A subclass makes `blocks`, each called with (x, table, mask, cache, layer), the modules declared here, and the four
    methods that tell what conditions and tokens are. `config` has all sizes set.
    """

    origin: Origin | None = None
    norm: RMSNorm
    output: nn.Linear
    token_dropout: nn.Dropout

    def __init__(self, config: RotaryConfig):
        super().__init__()
        for key in config.needed_sizes:
            if getattr(config, key) < 1:
                raise UserError(f"model.{key}: {getattr(config, key)} is not positive; set it or build from a store")
        self.config = config
        self.vocab_size, self.num_tokens, self.num_classes = config.vocab_size, config.num_tokens, config.num_classes
        self.num_layers, self.width, self.prefix_length = config.num_layers, config.width, config.prefix_length

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, n, D) <- (B, n) int64."""
        ...

    @abstractmethod
    def embed_condition(self, condition: Any) -> Tensor:
        """(B, P, D)."""
        ...

    @abstractmethod
    def kept_positions(self, condition: Any) -> Tensor | None:
        """Which of the P condition tokens are no padding, (B, P) bool; None: all."""
        ...

    @abstractmethod
    def null_condition(self, condition: Any) -> Any:
        """What guidance and condition dropout use instead."""
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

    def new_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> KVCache:
        return KVCache(
            self.num_layers,
            batch_size,
            self.config.num_key_heads,
            self.prefix_length + self.num_tokens,
            self.width // self.config.num_heads,
            device=self.output.weight.device,
            dtype=dtype or self.output.weight.dtype,
        )

    def rotary_table(self, device: torch.device) -> Tensor:
        """(P + N, head width / 2, 2) of this shape."""
        config = self.config
        head_dim = self.width // config.num_heads
        return rotary_table(head_dim, self.prefix_length, self.num_tokens, config.grid, config.rope_base, device)

    def forward(
        self,
        context: Tensor,
        condition: Any,
        *,
        cache: KVCache | None = None,
        tap_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, n, V) for the n tokens of `context` (B, n) int64; (B, P + n, D) after each layer of `tap_layers`.

        With a cache: `context` holds the tokens not yet read, and the logits are those of the next token, (B, 1, V).
        """
        hidden, taps = self.hidden_states(context, condition, cache=cache, tap_layers=tap_layers)
        first = self.prefix_length - 1
        predicting = hidden[:, -1:] if cache is not None else hidden[:, first : first + context.shape[1]]
        return self.output(predicting), taps

    def hidden_states(
        self,
        context: Tensor,
        condition: Any,
        *,
        cache: KVCache | None = None,
        tap_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What `output` reads, at every new position: (B, P + n, D) without a cache."""
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
        taps = {}
        for layer, block in enumerate(cast(nn.ModuleList, self.blocks)):
            x = block(x, table, mask, cache, layer)
            if layer in tap_layers:
                taps[layer] = x
        if cache is not None:
            cache.advance(end - start)
        return self.norm(x), taps
