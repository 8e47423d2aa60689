"""The released architectures that can be converted: one record for each, beside none of which there is logic."""

from consonar.convert.layouts import generators, janus, tokenizers
from consonar.convert.layouts.official import Official

OFFICIALS: tuple[Official, ...] = (
    tokenizers.LLAMAGEN, tokenizers.MASKGIT, tokenizers.VQGAN_PLUS, tokenizers.TITOK, tokenizers.ALITOK,
    generators.REAR, generators.LLAMAGEN, generators.ALITOK,
    *janus.OFFICIALS,
)  # fmt: skip
