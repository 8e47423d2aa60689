"""MaskGIT's tokenizer: VQGAN (arXiv 2012.09841) without attention (arXiv 2202.04200), as reAR, RAR and TiTok use it.

State-dict keys are those of the released `maskgit-vqgan-imagenet-f16-256.bin`. Facts kept from its code (1d-tokenizer),
besides those of `conv.py`: average pooling halves the resolution; nearest-neighbour upsampling and a convolution double
it; the decoder's levels are stored from full to lowest resolution and run the other way; codes are not normalised.

Deviation: the released `decode` clamps to [0, 1], ours leaves clamping to the caller.
"""

from dataclasses import dataclass
from typing import Literal

from consonar.tokenizers.base import Codebook
from consonar.tokenizers.conv import ConvConfig, ConvTokenizer, conv_decoder, conv_encoder


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(ConvConfig):
    """Shape of a MaskGIT-VQGAN tokenizer; the defaults are the released one."""

    kind: Literal["maskgit-vq"] = "maskgit-vq"


class MaskGITTokenizer(ConvTokenizer):
    def __init__(self, config: MaskGITConfig, name: str = "maskgit-vq"):
        super().__init__(config, name)
        self.encoder = conv_encoder(config, "block", strided=False)
        self.decoder = conv_decoder(config, "block", config.num_res_blocks)
        self.quantize = Codebook(config.vocab_size, config.code_dim)
