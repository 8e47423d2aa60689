"""The kinds of tokenizers. A stored one is loaded by `consonar.components`."""

import math
from dataclasses import replace

from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.base import CodebookTokenizer
from consonar.tokenizers.conv import ConvConfig
from consonar.tokenizers.maskgit import MaskGITConfig, MaskGITTokenizer
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.tokenizers.vqgan_plus import VQGANPlusConfig, VQGANPlusTokenizer
from consonar.types import Kind, ModelConfig

TOKENIZERS: dict[str, Kind[ModelConfig, CodebookTokenizer]] = {
    "vq": Kind(VQConfig, VQTokenizer, trainable=True),
    "maskgit-vq": Kind(MaskGITConfig, MaskGITTokenizer, trainable=True),
    "vqgan-plus": Kind(VQGANPlusConfig, VQGANPlusTokenizer),
    "titok": Kind(TiTokConfig, TiTokTokenizer),
    "alitok": Kind(AliTokConfig, AliTokTokenizer),
}
"""The kinds, by what files call them."""


def resized(config: ModelConfig, num_tokens: int) -> ModelConfig:
    """The configuration for square images of `num_tokens` tokens, where the architecture takes any size.

    Convolutions do: LlamaGen's VQ serves its generators at 256, 384 and 512 px with the same weights. Others come back
    as they are, and so does one that no square image gives so many tokens.
    """
    side = math.isqrt(num_tokens)
    if not isinstance(config, ConvConfig) or side * side != num_tokens:
        return config
    return replace(config, image_size=side * config.downsampling)
