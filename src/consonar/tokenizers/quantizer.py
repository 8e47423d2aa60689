"""Vector quantisation: nearest code, straight-through gradient, usage. Pure functions.

`K` codes of width `C`; `M` vectors. Sources: VQ-VAE (van den Oord et al. 2017, eq. 1-3); l2-normalised codes: ViT-VQGAN
(Yu et al. 2021, section 3.2). In float32 also inside an update in bf16: a search with fewer bits finds other codes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from consonar.float32 import in_float32


@in_float32
def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(M, K) <- (M, C), (K, C): |v|^2 - 2 v.c + |c|^2."""
    return vectors.square().sum(1, keepdim=True) - 2 * vectors @ codebook.T + codebook.square().sum(1)


@in_float32
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each vector: (M,) int64 <- (M, C), (K, C)."""
    return squared_distances(vectors, codebook).argmin(1)


@in_float32
def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes' values with the vectors' gradient."""
    return vectors + (codes - vectors).detach()


@in_float32
def codebook_loss(vectors: Tensor, codes: Tensor) -> Tensor:
    """Moves the codes to the encoder's vectors (VQ-VAE eq. 3, second term)."""
    return F.mse_loss(codes, vectors.detach())


@in_float32
def commitment_loss(vectors: Tensor, codes: Tensor) -> Tensor:
    """Moves the encoder's vectors to their codes (VQ-VAE eq. 3, third term, without its weight)."""
    return F.mse_loss(vectors, codes.detach())


def code_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs: (K,) int64 <- tokens of any shape."""
    tokens = tokens.flatten()  # `bincount` would wait for the device, to see how large the tokens are
    return torch.zeros(vocab_size, dtype=torch.int64, device=tokens.device).scatter_add_(
        0, tokens, torch.ones_like(tokens)
    )


def usage(counts: Tensor) -> float:
    """Share of codes that occur at all, 0..1."""
    return float((counts > 0).float().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the code frequencies: 1 (one code) .. K (all equally often)."""
    frequencies = counts.double() / counts.sum()
    return float(torch.special.entr(frequencies).sum().exp())
