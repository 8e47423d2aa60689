"""What all tokenizers share: the codebook, and what happens around the networks.

Letters: `B` batch, `N` tokens, `V` vocabulary, `C` code width, `H`, `W` pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.config_io import to_dict
from consonar.data.transforms import ImageSize
from consonar.errors import UserError
from consonar.files.weights import component_fingerprint
from consonar.float32 import LOW
from consonar.options import Count, Range
from consonar.tokenizers import quantizer
from consonar.types import Grid, ModelConfig

CodebookSize = Annotated[int, Range(2)]
"""One code alone would say nothing of a picture."""
OVERSHOOT = 2.0
"""Largest magnitude of a pixel that is still one of [-1, 1], sharpened, resampled or decoded, and not one of 0..255."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(ModelConfig):
    """Shape of a tokenizer."""

    image_size: ImageSize = 256
    """Side of the square images, pixels."""
    vocab_size: CodebookSize
    """Number of codes."""
    code_dim: Count
    """Width of one code."""


@dataclass(frozen=True)
class VQOutput:
    """One training pass: reconstruction (B, 3, H, W); vectors, before the search, and codes (B*N, C); tokens (B, N)."""

    reconstruction: Tensor
    vectors: Tensor
    codes: Tensor
    tokens: Tensor


class Codebook(nn.Module):
    """Codes (V, C), drawn uniformly within `bound` of 0; None: 1 / V, as most released code does."""

    def __init__(self, vocab_size: int, code_dim: int, bound: float | None = None):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, code_dim)
        bound = 1.0 / vocab_size if bound is None else bound
        self.embedding.weight.data.uniform_(-bound, bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `bfloat16` and the like do, but that codes stay float32: rounded ones are nearest to others."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in LOW else moved

        return super()._apply(kept, recurse)


class CodebookTokenizer(nn.Module, ABC):
    """A tokenizer as a module; follows `consonar.types.Tokenizer`. Subclasses give `latents` and `pixels`."""

    unit_range = True
    """Whether the networks work on pixels in [0, 1]; images change range here."""
    # Set by subclasses; `quantize` where there is a table of codes.
    encoder: nn.Module
    decoder: nn.Module
    quantize: Codebook

    def __init__(self, config: TokenizerConfig, name: str, num_tokens: int, grid: Grid | None, *, l2_normalize: bool):
        super().__init__()
        self.config, self.name, self.num_tokens, self.l2_normalize = config, name, num_tokens, l2_normalize
        self.grid: Grid | None = grid
        self.vocab_size, self.code_dim, self.image_size = config.vocab_size, config.code_dim, config.image_size

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """What the encoder makes of images in the networks' range: (B, N, C) <- (B, 3, H, W)."""

    @abstractmethod
    def pixels(self, codes: Tensor) -> Tensor:
        """Images in the networks' range, not clamped: (B, 3, H, W) <- (B, N, C)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' weights. Pictures and codes are float32 whatever it is."""
        return next(self.decoder.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and the weights."""
        return component_fingerprint(to_dict(self.config), self.state_dict())

    @property
    def codebook(self) -> Tensor:
        """(V, C): the codes as searched and decoded."""
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.l2_normalize else weight

    def vectors(self, images: Tensor) -> Tensor:
        """What is compared with the codes: (B*N, C) float32 <- (B, 3, H, W)."""
        self._check_images(images)
        images = ((images + 1) / 2 if self.unit_range else images).to(self.dtype)
        vectors = self.latents(images).float().flatten(0, 1)
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def search(self, vectors: Tensor) -> Tensor:
        """The code of each vector: (B*N,) int64 <- (B*N, C)."""
        return quantizer.nearest_code(vectors, self.codebook)

    def encode(self, images: Tensor) -> Tensor:
        return self.search(self.vectors(images)).view(len(images), self.num_tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook)

    def decode(self, tokens: Tensor) -> Tensor:
        if getattr(tokens, "dtype", None) not in (torch.int64, torch.int32) or tokens.ndim != 2:
            raise UserError(f"{self.name}: {described(tokens)}; tokens are a tensor of int64, (B, {self.num_tokens})")
        self._check_values(tokens, 0, self.vocab_size - 1, "tokens", f"from 0 to {self.vocab_size - 1}")
        return self.decode_embeddings(self.embed(tokens))

    def decode_embeddings(self, codes: Tensor) -> Tensor:
        if codes.shape[1] != self.num_tokens:
            # A transformer would broadcast one token to all positions without an error.
            raise UserError(f"{self.name}: {codes.shape[1]} tokens per image, this tokenizer decodes {self.num_tokens}")
        images = self.pixels(codes.to(self.dtype)).float()
        return 2 * images - 1 if self.unit_range else images

    def forward(self, images: Tensor) -> VQOutput:
        """One training pass with the straight-through gradient."""
        vectors = self.vectors(images)
        with torch.no_grad():
            tokens = self.search(vectors)
        codes = self.embed(tokens)
        passed = quantizer.straight_through(vectors, codes).view(len(images), self.num_tokens, self.code_dim)
        return VQOutput(self.decode_embeddings(passed), vectors, codes, tokens.view(len(images), self.num_tokens))

    def _check_images(self, images: Tensor) -> None:
        """Raises `UserError` for what is no batch of images in [-1, 1], reconstructions and resampled ones included."""
        own = torch.float32 if self.dtype in LOW else self.dtype
        floating = isinstance(images, Tensor) and images.is_floating_point()
        is_cast = floating and torch.is_autocast_enabled(images.device.type)  # to the numbers of the weights
        if getattr(images, "dtype", None) not in (own, self.dtype) and not is_cast:
            raise UserError(f"{self.name}: {described(images)}; images are a tensor of {own} in [-1, 1]")
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise UserError(f"{self.name}: images of shape {tuple(images.shape[1:])}, this tokenizer reads {expected}")
        self._check_values(images, -OVERSHOOT, OVERSHOOT, "images", "in [-1, 1]")

    def _check_values(self, given: Tensor, low: float, high: float, what: str, words: str) -> None:
        """Raises `UserError` for numbers outside of a range. On the CPU alone: any other device would be waited for."""
        if given.device.type == "cpu" and given.numel():
            least, most = (float(end) for end in given.detach().aminmax())  # both NaN where one number is
            if not (low <= least and most <= high):
                raise UserError(f"{self.name}: {what} from {least:g} to {most:g}; give them {words}")


def described(given: object) -> str:
    """What was given, in words: the shape and type of a tensor, else what it is."""
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def as_grid(x: Tensor, side: int) -> Tensor:
    """(B, C, h, w) <- (B, h*w, C) in raster order."""
    return x.transpose(1, 2).unflatten(2, (side, side))


def as_row(maps: Tensor) -> Tensor:
    """(B, h*w, C) <- (B, C, h, w): the inverse of `as_grid`."""
    return maps.flatten(2).transpose(1, 2)
