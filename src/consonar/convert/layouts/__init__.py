"""The released architectures that can be converted: one record for each, beside none of which there is logic."""

from consonar.convert.layouts import alitok, janus, llamagen, maskgit, rear, titok, vqgan_plus
from consonar.convert.layouts.official import Official

OFFICIALS: tuple[Official, ...] = (
    llamagen.TOKENIZER,
    maskgit.OFFICIAL,
    vqgan_plus.OFFICIAL,
    titok.OFFICIAL,
    alitok.TOKENIZER,
    rear.OFFICIAL,
    llamagen.GENERATOR,
    alitok.GENERATOR,
    *janus.OFFICIALS,
)
