"""The released architectures that can be converted, and which of them a file is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.official import Official, Shapes


def officials() -> tuple[Official, ...]:
    """One record per released architecture. Imported here, because a record imports its model."""
    from consonar.convert import janus, rear, vq
    from consonar.generators import alitok as alitok_ar
    from consonar.generators import llamagen
    from consonar.tokenizers import alitok, maskgit, titok, vqgan_plus

    return (
        vq.OFFICIAL,
        maskgit.OFFICIAL,
        vqgan_plus.OFFICIAL,
        titok.OFFICIAL,
        alitok.OFFICIAL,
        rear.OFFICIAL,
        llamagen.OFFICIAL,
        alitok_ar.OFFICIAL,
        *janus.OFFICIALS,
    )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key to shape, which is all that recognition looks at."""
    return {key: tuple(value.shape) for key, value in state.items()}


def recognise(shapes: Shapes, where: str) -> Official:
    """The one record that these keys and shapes are of; `UserError` lists what is known and what the file holds."""
    found = [official for official in officials() if official.recognises(shapes)]
    assert len(found) < 2, f"{where}: recognised as {[official.name for official in found]}"
    if not found:
        known = ", ".join(official.name for official in officials())
        held = ", ".join(sorted(shapes)[:4])
        raise UserError(f"{where}: not a released model that is known here ({known}); its first keys: {held}")
    return found[0]


def build(component: str, config: Any, name: str) -> Any:
    """The tokenizer or generator of a configuration, on the meta device: keys and shapes, no memory."""
    from consonar.generators import build_generator
    from consonar.tokenizers import TOKENIZERS

    with torch.device("meta"):
        return TOKENIZERS[config.kind][1](config, name=name) if component == "tokenizer" else build_generator(config)
