"""The kinds of tokenizers. A stored one is loaded by `consonar.components`."""

import math
from dataclasses import replace

from consonar.tokenizers import alitok, titok, vq, vqgan
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Kind, ModelConfig

TOKENIZERS: dict[str, Kind[ModelConfig, CodebookTokenizer]] = {
    "vq": Kind(vq.VQConfig, vq.VQTokenizer, trainable=True),
    "maskgit-vq": Kind(vqgan.MaskGITConfig, vqgan.MaskGITTokenizer, trainable=True),
    "vqgan-plus": Kind(vqgan.VQGANPlusConfig, vqgan.VQGANPlusTokenizer),
    "titok": Kind(titok.TiTokConfig, titok.TiTokTokenizer),
    "alitok": Kind(alitok.AliTokConfig, alitok.AliTokTokenizer),
}
"""The kinds, by what files call them."""


def resized(config: ModelConfig, num_tokens: int) -> ModelConfig:
    """The configuration for square images of `num_tokens` tokens, where the architecture takes any size.

    Convolutions do: LlamaGen's VQ serves its generators at 256, 384 and 512 px with the same weights. Others come back
    as they are, and so does one that no square image gives so many tokens.
    """
    side = math.isqrt(num_tokens)
    if not isinstance(config, vqgan.ConvConfig) or side * side != num_tokens:
        return config
    return replace(config, image_size=side * config.downsampling)
