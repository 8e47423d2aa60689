"""VQGAN+ (MaskBit, arXiv 2409.16211), with a codebook or with the bits of lookup-free quantisation.

State-dict keys are those of the released files (MaskBit's `ConvVQModel`, reAR's `VQPlus`). Facts kept from their code,
besides those of `conv.py`: the resolution is halved by stride-2 convolutions or by average pooling; the decoder's
levels are stored in the order of execution; codes may be l2-normalised on both sides of the search. Lookup-free
(MAGVIT-v2, arXiv 2310.05737): a code is the signs of the latents, in {-1, +1}, with 0 counted as -1; its token is the
sum of 2^i over the positive channels i = 0, 1, ...

Deviation: the constant tables of the released lookup-free quantiser are not kept as buffers.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.options import Count, ReadOnlyWith
from consonar.tokenizers.base import Codebook
from consonar.tokenizers.conv import ConvConfig, ConvTokenizer, conv_decoder, conv_encoder

CODEBOOK = ReadOnlyWith(lambda given: given.quantizer == "lookup", "{}quantizer 'lookup': lookup-free codes are signs")


@dataclass(frozen=True, kw_only=True)
class VQGANPlusConfig(ConvConfig):
    """Shape of a VQGAN+ tokenizer; the defaults are the one that reAR uses."""

    kind: Literal["vqgan-plus"] = "vqgan-plus"
    vocab_size: Count = 4096
    """Number of codes; 2 to the power of `code_dim` for lookup-free ones."""
    code_dim: Count = 64
    """Width of one code; its number of bits for lookup-free ones."""
    quantizer: Literal["lookup", "lookup-free"] = "lookup"
    """Codes from a learnt codebook, or all combinations of signs."""
    l2_normalize: Annotated[bool, CODEBOOK] = False
    """Search and decode unit-norm codes; for `lookup` only."""
    downsample: Literal["convolution", "average"] = "convolution"
    """What halves the resolution in the encoder: convolutions of stride 2, or the mean of 2 x 2 places."""
    num_decoder_blocks: Count | None = None
    """Residual blocks per level and in the middle of the decoder; None: `num_res_blocks`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer == "lookup-free" and self.vocab_size != 2**self.code_dim:
            raise UserError(
                f"model.vocab_size: {self.vocab_size}; lookup-free codes of {self.code_dim} bits (code_dim) are "
                f"2 to the power of {self.code_dim}"
            )


def sign_codes(tokens: Tensor, num_bits: int) -> Tensor:
    """(..., num_bits) float in {-1, +1} <- (...) int64; channel i is the bit of weight 2^i."""
    bits = (tokens[..., None] >> torch.arange(num_bits, device=tokens.device)) & 1
    return 2.0 * bits - 1.0


def sign_tokens(vectors: Tensor) -> Tensor:
    """(...) int64 <- (..., num_bits): the inverse of `sign_codes`, for any vectors; 0 counts as -1."""
    weights = 2 ** torch.arange(vectors.shape[-1], device=vectors.device)
    return ((vectors > 0) * weights).sum(-1)


class VQGANPlusTokenizer(ConvTokenizer):
    def __init__(self, config: VQGANPlusConfig, name: str = "vqgan-plus"):
        super().__init__(config, name, l2_normalize=config.l2_normalize)
        blocks = config.num_res_blocks if config.num_decoder_blocks is None else config.num_decoder_blocks
        self.encoder = conv_encoder(config, "res_blocks", strided=config.downsample == "convolution")
        self.decoder = conv_decoder(config, "res_blocks", blocks)
        self.lookup_free = config.quantizer == "lookup-free"
        if not self.lookup_free:
            self.quantize = Codebook(config.vocab_size, config.code_dim)

    @property
    def codebook(self) -> Tensor:
        if self.lookup_free:
            device = next(self.parameters()).device
            return sign_codes(torch.arange(self.vocab_size, device=device), self.code_dim)
        return super().codebook

    def search(self, vectors: Tensor) -> Tensor:
        return sign_tokens(vectors) if self.lookup_free else super().search(vectors)

    def embed(self, tokens: Tensor) -> Tensor:
        # Not by way of the table: it has 2^18 rows in the largest released model.
        return sign_codes(tokens, self.code_dim) if self.lookup_free else super().embed(tokens)
