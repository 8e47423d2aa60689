"""The released architectures that can be converted: one record for each, beside none of which there is logic."""

from consonar.convert.layouts import (
    alitok,
    alitok_ar,
    janus,
    llamagen,
    llamagen_vq,
    maskgit,
    rear,
    titok,
    vqgan_plus,
)
from consonar.convert.layouts.official import Official

OFFICIALS: tuple[Official, ...] = (
    llamagen_vq.OFFICIAL,
    maskgit.OFFICIAL,
    vqgan_plus.OFFICIAL,
    titok.OFFICIAL,
    alitok.OFFICIAL,
    rear.OFFICIAL,
    llamagen.OFFICIAL,
    alitok_ar.OFFICIAL,
    *janus.OFFICIALS,
)
