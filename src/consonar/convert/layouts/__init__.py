"""The released architectures that can be converted: one record for each, beside none of which there is logic."""

from consonar.convert.layouts import alitok, janus, llamagen, rear, tokenizers
from consonar.convert.layouts.official import Official

OFFICIALS: tuple[Official, ...] = (
    llamagen.TOKENIZER,
    tokenizers.MASKGIT,
    tokenizers.VQGAN_PLUS,
    tokenizers.TITOK,
    alitok.TOKENIZER,
    rear.OFFICIAL,
    llamagen.GENERATOR,
    alitok.GENERATOR,
    *janus.OFFICIALS,
)
