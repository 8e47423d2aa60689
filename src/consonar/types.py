"""The seams of consonar: small protocols and the frozen dataclasses that cross them. No logic.

Letters used for shapes everywhere: `B` batch, `N` tokens per image, `V` vocabulary, `C` code width, `D` model width,
`P` prefix positions of a generator, `H`, `W` pixels. Images are float32 in [-1, 1]; tokens are int64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from consonar.options import Options
from consonar.origin import HasFingerprint, Origin
from consonar.records import Captions


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one image sit: `prefix` tokens without a place, then rows x columns in raster order."""

    rows: int
    columns: int
    prefix: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """The shape of a model; `kind` names it in files."""

    section = "model"

    kind: str


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set, before any crop."""

    image: Image.Image
    """RGB, any size."""
    name: str
    """Unique inside its source; what error messages and reports call it."""
    label: int | None = None
    caption: str | None = None
    """What it shows; of several captions each is a line."""


@runtime_checkable
class ImageSource(Protocol):
    """A named collection of images that can be walked through more than once."""

    name: str
    class_names: tuple[str, ...] | None

    def __iter__(self) -> Iterator[ImageRecord]: ...


@runtime_checkable
class IndexedSource(ImageSource, Protocol):
    """A source whose images can be read in any order and from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> ImageRecord:
        """Decode image `index`, 0 <= index < len(self)."""


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
class TokenBatch:
    """Images as tokens. Every tensor has the same first dimension B, here and in all batches."""

    tokens: Tensor
    """(B, N) int64."""
    condition: Condition
    indices: Tensor | None = None
    """(B,) int64 row of each item in its store; None for items of no store."""


@dataclass(frozen=True)
class ImageBatch:
    """The images themselves."""

    images: Tensor
    """(B, 3, H, W) float in [-1, 1]."""
    condition: Condition
    indices: Tensor | None = None
    """(B,) int64 row of each item in its source; None for items of no source."""
    captions: Captions | None = None
    """Where the source has some, and the generator takes them."""


@dataclass(frozen=True)
class EncodedBatch(ImageBatch):
    """Images with their tokens."""

    tokens: Tensor = field(kw_only=True)
    """(B, N) int64."""


@dataclass(frozen=True)
class Prediction:
    """What a trainee returns: logits (B, N, V), row i for token i, and the outputs of its training-only heads."""

    logits: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Tokenizer(HasFingerprint, Protocol):
    """A frozen image tokenizer. Images are (B, 3, H, W) float in [-1, 1] on this side of the seam, always."""

    vocab_size: int
    num_tokens: int
    code_dim: int
    image_size: int
    grid: Grid | None

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N) int64."""

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, N, C): the vectors that the decoder receives for these tokens."""

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, 3, H, W), not clamped."""

    def decode_embeddings(self, codes: Tensor) -> Tensor:
        """(B, N, C) -> (B, 3, H, W), differentiable."""


@runtime_checkable
class TextEncoder(HasFingerprint, Protocol):
    """A frozen map from captions to features of their tokens, or to tokens of the generator's own vocabulary."""

    width: int
    """F, of a token's features; 0: tokens."""
    length: int
    """L: a caption's places, padded on the left; of tokens the most."""

    @property
    def uncut(self) -> str:
        """Fingerprint without L: of two encoders that share it, what neither cuts has the same features, or tokens."""

    def encode(self, captions: Sequence[str]) -> TextCondition | PromptCondition:
        """Features (B, L, F) float32, or tokens (B, longest), and the mask (without words: False), on one device."""

    def has_words(self, caption: str) -> bool:
        """Whether there is anything for it to read in a caption: a token that is not a special one."""

    def is_cut(self, caption: str) -> bool:
        """Whether a caption has more tokens than are read."""

    def knows(self, caption: str) -> bool:
        """Whether all of a caption is in its vocabulary; whatever is not reads alike."""


class Weights(Protocol):
    """What is asked of a model as a module; every `nn.Module` has it."""

    def to(self, device: torch.device | str) -> Self: ...
    def eval(self) -> Self: ...
    def children(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, assign: bool = False) -> object: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


class Cache(Protocol):
    """Keys and values of the tokens read so far; made by `Generator.new_cache`, owned by the caller."""

    @property
    def length(self) -> int: ...


class Generator(Weights, Protocol):
    """A causal model of token sequences. `logits[:, i]` predicts token i, in training and in evaluation alike."""

    vocab_size: int
    num_tokens: int
    num_classes: int
    """Conditions 0 .. num_classes - 1 are classes."""
    num_layers: int
    width: int
    prefix_length: int
    """P: hidden states at P + i read token i, those at P + i - 1 predict it."""
    origin: Origin | None
    """What it was made of and with, where it was loaded."""
    recompute_every: int
    """Activation checkpointing: of which blocks training keeps the input alone, each so many-th; 0: of none."""

    def __call__(
        self, context: Tensor, condition: Condition, *, cache: Cache | None = None, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, N, V) and the hidden states (B, P + N, D) after each layer of `tap_layers`. With a cache,
        `context` holds only the tokens that the cache has not read yet (none at the first call) and the logits are
        those of the next token, (B, 1, V)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Its transformer blocks: what `loop.compile` compiles."""

    @property
    def config(self) -> ModelConfig:
        """What it was made from."""

    # Any: of every kind of condition, but each generator takes one.
    def null_condition(self, condition: Any) -> Any:
        """The condition that guidance and condition dropout use instead, same type and shape."""

    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Draws every weight anew, from `rng`."""

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` rows on the generator's device."""


Config = TypeVar("Config", covariant=True)
Model = TypeVar("Model", covariant=True)


class Kind(NamedTuple, Generic[Config, Model]):
    """A row of the table of generators or of tokenizers."""

    config: type[Config]
    model: Callable[..., Model]
    """The class of the generator or tokenizer."""
    trainable: bool = False
    """Of a tokenizer, whether `train` can make one (`objectives.reconstruction`)."""


class Reward(Protocol):
    """A plain function is enough: (images, originals, batch) -> (B,), higher is better. Row b of `batch` is what image
    b was made from: images, condition, indices, captions, and in training tokens."""

    def __call__(self, images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor: ...


Item = TypeVar("Item", contravariant=True)
Prepared = TypeVar("Prepared")
"""What an objective makes of a batch of the kind that it reads (`Item`): a record (`consonar.records`) of its own."""


class Objective(Protocol[Item, Prepared]):
    """What a method is: what it makes of a batch, and what is minimised; to inherit, or to follow. The model is the
    trainee of its kind of run, or that wrapped for several processes, hence `Any`."""

    about: tuple[str, ...] = ()  # lines that its run says at the start

    def prepare(self, model: Any, batch: Item, step: int) -> Prepared:
        """Whatever is corrupted, drawn or rewarded before the model is updated, without gradient."""

    def loss(self, model: Any, prepared: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and its named terms, for the log, of a prepared batch or some rows of it. What is
        drawn from the very logits that are updated is drawn and rewarded here."""

    def state(self, step: int) -> dict[str, float]:
        """What else moves over training at this step (a noise rate, say), by name, for the log."""
        return {}

    def breach(self, values: Mapping[str, float]) -> str | None:
        """Why training must stop here, judged by these logged values; None: go on."""
        return None

    def validate(self, model: Any, batches: Iterator[Item]) -> dict[str, float]:
        """Metrics of a trainee on held-out batches, by name: means over all items, without gradient."""
