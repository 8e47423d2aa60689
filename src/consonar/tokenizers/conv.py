"""What MaskGIT's VQGAN and VQGAN+ share: residual blocks, the configuration, and the tokenizer around them.

Facts kept from the released code of both (1d-tokenizer's `maskgit_vqgan.py`, MaskBit's `autoencoder.py`): the networks
work on pixels in [0, 1], so images change range at the border of `ConvTokenizer`; GroupNorm with eps 1e-6; residual
blocks have no biases in their convolutions and, where the number of channels changes, their 1x1 shortcut is applied to
the OUTPUT of the branch, so that the block's input is dropped; "same" padding, which for stride 2 is one row below and
one column on the right.

Deviation: released groups are always 32; here `num_groups` is a field, so that tiny models exist.

Letters: `B` batch, `N` tokens (raster order), `V` vocabulary, `C` code width, `h`, `w` token grid, `H`, `W` pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from consonar.checkpoint import component_fingerprint
from consonar.config_io import to_dict
from consonar.errors import UserError
from consonar.tokenizers import quantizer
from consonar.tokenizers.vq import VQOutput, normalization
from consonar.types import Grid


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Shape of a convolutional tokenizer without attention."""

    image_size: int = 256
    """Side of the square images, pixels."""
    vocab_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Width of one code."""
    base_channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of `base_channels`; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level and in the middle, in the encoder and the decoder."""
    num_groups: int = 32
    """Groups of every GroupNorm; divides every channel count."""

    def __post_init__(self) -> None:
        for key in ("image_size", "vocab_size", "code_dim", "base_channels", "num_res_blocks", "num_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}: {getattr(self, key)} is not positive")
        if not self.channel_multipliers:
            raise UserError("model.channel_multipliers: empty; one number per resolution, e.g. 1 1 2 2 4")
        if self.image_size % self.downsampling:
            raise UserError(
                f"model.image_size: {self.image_size} is not a multiple of {self.downsampling} "
                "(2 to the number of channel_multipliers less one)"
            )
        for multiplier in (1, *self.channel_multipliers):
            if multiplier < 1 or self.base_channels * multiplier % self.num_groups:
                raise UserError(
                    f"model.num_groups: {self.num_groups} does not divide {self.base_channels * multiplier} channels"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each resolution, from full to lowest."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]


class ResidualBlock(nn.Module):
    """x + r(x) with r = conv(silu(norm(conv(silu(norm(x)))))); r(x) + shortcut(r(x)) where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = normalization(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = normalization(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.same_width = channels_in == channels_out
        if not self.same_width:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.same_width else self.nin_shortcut(hidden))


def residual_blocks(channels_in: int, channels_out: int, count: int, groups: int) -> nn.ModuleList:
    """`count` blocks, of which the first changes the number of channels."""
    widths = [channels_in] + [channels_out] * count
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))


def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Codebook(nn.Module):
    """Codes (V, C), drawn as the released code does: uniformly within 1 / V of 0."""

    def __init__(self, vocab_size: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, code_dim)
        self.embedding.weight.data.uniform_(-1.0 / vocab_size, 1.0 / vocab_size)


def num_indices(keys: Iterable[str], prefix: str) -> int:
    """How many entries the module list `prefix` has in a state dict with these keys."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


class ConvTokenizer(nn.Module, ABC):
    """Images of [-1, 1] around an encoder, a search and a decoder of [0, 1]; follows `consonar.types.Tokenizer`."""

    config: ConvConfig
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: ConvConfig, name: str):
        super().__init__()
        self.config, self.name = config, name
        self.vocab_size, self.code_dim, self.image_size = config.vocab_size, config.code_dim, config.image_size
        side = config.image_size // config.downsampling
        self.grid: Grid | None = Grid(side, side)
        self.num_tokens = side * side

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(V, C): the codes as searched and decoded."""

    def vectors(self, images: Tensor) -> Tensor:
        """What is compared with the codes, here the encoder's output: (B*N, C) <- (B, 3, H, W)."""
        latents = self.encoder((images + 1) / 2).float()  # (B, C, h, w)
        return latents.permute(0, 2, 3, 1).reshape(-1, self.code_dim)

    def search(self, vectors: Tensor) -> Tensor:
        """The code of each vector: (B*N,) int64 <- (B*N, C)."""
        return quantizer.nearest_code(vectors, self.codebook)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and the weights."""
        return component_fingerprint(to_dict(self.config), self.state_dict())

    def encode(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return self.search(self.vectors(images)).view(len(images), self.num_tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_embeddings(self.embed(tokens))

    def decode_embeddings(self, codes: Tensor) -> Tensor:
        assert self.grid is not None
        latents = codes.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))  # (B, C, h, w)
        return 2 * self.decoder(latents).float() - 1

    def forward(self, images: Tensor) -> VQOutput:
        """One training pass with the straight-through gradient."""
        self._check_images(images)
        vectors = self.vectors(images)
        tokens = self.search(vectors.detach())
        codes = self.embed(tokens)
        passed = quantizer.straight_through(vectors, codes).view(len(images), self.num_tokens, self.code_dim)
        return VQOutput(self.decode_embeddings(passed), vectors, codes, tokens.view(len(images), self.num_tokens))

    def _check_images(self, images: Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise UserError(f"{self.name}: images of shape {tuple(images.shape[1:])}, this tokenizer reads {expected}")
