"""What all generators share: sizes that the data say, the cache, and which hidden states predict which token.

Sequence [condition, token 0, token 1, ...], causal; hidden state P - 1 + i predicts token i.

Letters: `B` batch, `n` new tokens, `N` tokens, `V` codes, `D` width, `P` condition tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from consonar.attention import KVCache
from consonar.errors import UserError
from consonar.options import Count, CountOrZero, Depth
from consonar.origin import Origin
from consonar.types import Grid, ModelConfig

Given = TypeVar("Given")
"""What a kind of generator is conditioned on."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ModelConfig):
    """Shape of a generator. Its own fields among vocab_size, num_tokens, num_classes and grid are set by the data."""

    vocab_size: CountOrZero = 0
    """Codes of the tokenizer; 0: taken from the token store."""
    num_tokens: CountOrZero = 0
    """Tokens per image; 0: taken from the token store."""
    width: Count = 768
    """Hidden size."""
    num_layers: Depth
    """Transformer blocks."""
    num_heads: Count
    """Attention heads."""

    @property
    def has_classes(self) -> bool:
        """Whether a class is what it is conditioned on."""
        return "num_classes" in self.__dataclass_fields__

    @property
    def caption_shape(self) -> tuple[int, int]:
        """Of one without classes, the places of a caption and the width of the features there; width 0: it reads tokens
        of a text vocabulary of its own."""
        return self.prefix_length, 0

    @property
    def prefix_length(self) -> int:
        """P."""
        return 1

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    def sized(self, vocab_size: int, num_tokens: int, num_classes: int, grid: Grid | None = None) -> Self:
        """This shape for given data, in the fields that it has; `UserError` when one was set to something else."""
        classes = num_classes if self.has_classes else 0
        given = {"vocab_size": vocab_size, "num_tokens": num_tokens, "num_classes": classes, "grid": grid}
        sizes: dict[str, Any] = {field.name: given[field.name] for field in fields(self) if field.name in given}
        for key, size in sizes.items():
            if getattr(self, key) not in (0, None, size):
                raise UserError(f"model.{key}: {getattr(self, key)}, but the token store has {size}")
        return replace(self, **sizes)


class CausalGenerator(nn.Module, ABC, Generic[Given]):
    """Follows `consonar.types.Generator`. `config` has all sizes set.

    A subclass makes `blocks`, called with (x, whatever they need, mask, cache, layer), what goes in and out,
    `reset_parameters`, and where it is conditioned on something else than classes the null condition.
    """

    origin: Origin | None = None
    blocks: nn.ModuleList
    recompute_every = 0

    def __init__(self, config: GeneratorConfig, num_classes: int):
        super().__init__()
        needed = ("vocab_size", "num_tokens", "num_classes") if config.has_classes else ("vocab_size", "num_tokens")
        for key in needed:
            if (size := getattr(config, key)) < 1:
                raise UserError(f"model.{key}: {size} is not positive; set it or build from a token store")
        self.config, self.num_classes = config, num_classes
        self.vocab_size, self.num_tokens = config.vocab_size, config.num_tokens
        self.num_layers, self.width, self.prefix_length = config.num_layers, config.width, config.prefix_length

    @abstractmethod
    def hidden_states(
        self, context: Tensor, condition: Given, *, cache: KVCache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What `logits` reads, at every new position, (B, P + n, D) without a cache; and the taps of `forward`."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(B, n, V) <- (B, n, D)."""

    def null_condition(self, condition: Any) -> Any:  # of the subclass's kind; here of classes
        """The null class, which is behind the others."""
        return torch.full_like(condition, self.num_classes)

    def new_cache(self, batch_size: int) -> KVCache:
        """In the type that attention multiplies in: under autocast that of autocast."""
        heads, head_dim = self.config.num_key_heads, self.width // self.config.num_heads
        shape = (self.num_layers, 2, batch_size, heads, self.prefix_length + self.num_tokens, head_dim)
        weight = next(self.parameters())
        kind = weight.device.type
        low = torch.is_autocast_enabled(kind) if torch.amp.is_autocast_available(kind) else False
        return KVCache(weight.new_zeros(shape, dtype=torch.get_autocast_dtype(kind) if low else weight.dtype))

    def look_ahead(self, condition: Given, cache: KVCache, place: int) -> None:
        """Called before the token at `place` is read where the device alone knows the place: makes what does not depend
        on tokens (`KVCache.tables`), for as many positions as pay, in the memory where it was made before."""

    def forward(
        self, context: Tensor, condition: Given, *, cache: KVCache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `consonar.types.Generator` says; with a cache the taps are those of the positions read by this call."""
        hidden, taps = self.hidden_states(context, condition, cache=cache, tap_layers=tap_layers)
        predicting = hidden[:, -1:] if cache is not None else hidden[:, -1 - context.shape[1] : -1]
        return self.logits(predicting), taps

    def run_blocks(
        self, x: Tensor, needed: object, mask: Tensor | None, cache: KVCache | None, tap_layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x (B, n, D) after all blocks, and after those of `tap_layers`; the cache has read it then."""
        taps, trains = {}, torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks):
            if trains and self.recompute_every and layer % self.recompute_every == 0:
                x = checkpoint(self.run_block, block, x, needed, mask, cache, layer, use_reentrant=False)
            else:
                x = self.run_block(block, x, needed, mask, cache, layer)
            if layer in tap_layers:
                taps[layer] = x
        if cache is not None:
            cache.advance(x.shape[1])
        return x, taps

    def run_block(
        self, block: nn.Module, x: Tensor, needed: object, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """One of the blocks."""
        return block(x, needed, mask, cache, layer)
