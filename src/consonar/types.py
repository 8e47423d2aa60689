"""The seams of consonar: small protocols and the frozen dataclasses that cross them. No logic.

Letters used for shapes everywhere: `B` batch, `N` tokens per image, `V` vocabulary, `C` code width, `D` model width,
`P` prefix positions of a generator, `H`, `W` pixels. Images are float32 in [-1, 1]; tokens are int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one image sit: `prefix` tokens without a place, then rows x columns in raster order."""

    rows: int
    columns: int
    prefix: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.rows * self.columns


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set, before any crop."""

    image: Image.Image
    """RGB, any size."""
    name: str
    """Unique inside its source; what error messages and reports call it."""
    label: int | None = None
    caption: str | None = None


@runtime_checkable
class ImageSource(Protocol):
    """A named collection of images that can be walked through more than once."""

    name: str
    class_names: tuple[str, ...] | None

    def __iter__(self) -> Iterator[ImageRecord]: ...


@dataclass(frozen=True)
class TextCondition:
    """Captions as the features of a text encoder, padded on the left."""

    features: Tensor
    """(B, L, F) float."""
    mask: Tensor
    """(B, L) bool, False at padding."""


@dataclass(frozen=True)
class PromptCondition:
    """Captions as token ids of the generator's own language model, padded on the left, start-of-image token last."""

    tokens: Tensor
    """(B, L) int64."""
    mask: Tensor
    """(B, L) bool, False at padding."""


Condition = Tensor | TextCondition | PromptCondition
"""Class ids (B,) int64, or captions."""


@dataclass(frozen=True)
class Batch:
    """What one optimiser step reads. Every tensor has the same first dimension B."""

    tokens: Tensor | None = None
    """(B, N) int64, or None when a tokenizer is trained."""
    condition: Condition | None = None
    """(B,) int64 class labels, or captions."""
    images: Tensor | None = None
    """(B, 3, H, W) float in [-1, 1]."""
    indices: Tensor | None = None
    """(B,) int64 row of each item in its store."""


@dataclass(frozen=True)
class Prediction:
    """What a trainee returns: logits (B, N, V), row i for token i, and the outputs of its training-only heads."""

    logits: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One micro-batch ready for the loss: prepared without gradient by `Objective.rollout`."""

    batch: Batch
    context: Tensor | None = None
    """(B, N) int64: the tokens fed under teacher forcing, maybe corrupted."""
    condition: Condition | None = None
    """The condition fed, maybe dropped to the null condition."""
    corrupted: Tensor | None = None
    """(B, N) bool: where `context` was replaced."""
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Tokenizer(Protocol):
    """A frozen image tokenizer. Images are (B, 3, H, W) float in [-1, 1] on this side of the seam, always."""

    name: str
    vocab_size: int
    num_tokens: int
    code_dim: int
    image_size: int
    grid: Grid | None

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and weights; token stores carry it."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N) int64."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, N, C): the vectors that the decoder receives for these tokens."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, 3, H, W), not clamped."""
        ...

    def decode_embeddings(self, codes: Tensor) -> Tensor:
        """(B, N, C) -> (B, 3, H, W), differentiable."""
        ...


class Cache(Protocol):
    """Keys and values of the tokens read so far; made by `Generator.new_cache`, owned by the caller."""

    length: int


@runtime_checkable
class Generator(Protocol):
    """A causal model of token sequences. `logits[:, i]` predicts token i, in training and in evaluation alike."""

    vocab_size: int
    num_tokens: int
    num_classes: int
    """Conditions 0 .. num_classes - 1 are classes."""
    num_layers: int
    width: int
    prefix_length: int
    """P: hidden states at P + i read token i, those at P + i - 1 predict it."""
    config: Any
    """The frozen dataclass that it was made from; has `kind` and `sized`."""
    blocks: Any
    """Its transformer blocks, an `nn.ModuleList`: what `loop.compile` compiles."""

    def __call__(
        self, context: Tensor, condition: Any, *, cache: Any = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, N, V) and the hidden states (B, P + N, D) after each layer of `tap_layers`.

        With a cache, `context` holds only the tokens that the cache has not read yet (none at the first call) and the
        logits are those of the next token, (B, 1, V).
        """
        ...

    def null_condition(self, condition: Any) -> Any:
        """The condition that guidance and condition dropout use instead, same type and shape."""
        ...

    def reset_parameters(self, rng: Any = None) -> None:
        """Draws every weight anew, from `rng`."""
        ...

    def new_cache(self, batch_size: int) -> Any:
        """An empty cache for `batch_size` rows on the generator's device."""
        ...


class Reward(Protocol):
    """A plain function is enough: (images, originals, batch) -> (B,), higher is better."""

    def __call__(self, images: Tensor, originals: Tensor, batch: Batch) -> Tensor: ...


class Objective(Protocol):
    """What a method is: how a batch is prepared, and what is minimised."""

    def rollout(self, model: Any, batch: Batch, step: int) -> Iterator[Rollout]:
        """Micro-batches, prepared without gradient: corrupt, sample, reward."""
        ...

    def loss(self, model: Any, rollout: Rollout, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and its named terms, for the log."""
        ...

    def state(self, step: int) -> dict[str, float]:
        """What else moves over training at this step (a noise rate, say), by name, for the log."""
        ...

    def breach(self, values: Mapping[str, float]) -> str | None:
        """Why training must stop here, judged by these logged values; None: go on."""
        ...

    def validate(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """Metrics of a trainee on held-out batches, by name: means over all items, without gradient."""
        ...
