"""What tensors from outside must be before they are weights: whole, finite, and as many as the model has layers for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from consonar.errors import UserError

MAX_REPEATED = 2**30
"""Bytes of a tensor that repeats a smaller storage (`expand`): a file of a kilobyte can claim any number."""


def check_plain(state: Mapping[Any, Tensor], where: str) -> None:
    """`UserError` names the first tensor whose numbers are not all there: sparse, quantized, nested, without memory, or
    a few numbers repeated over more than a gigabyte."""
    for key, value in state.items():
        plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested or value.is_meta)
        if not plain or value.nbytes > max(MAX_REPEATED, value.untyped_storage().nbytes()):
            raise UserError(
                f"{where}: {key} is not a plain tensor ({kind_of(value)}); save it as one, with all numbers"
            )


def kind_of(tensor: Tensor) -> str:
    """What a tensor is, in words, without reading it."""
    if tensor.is_nested:
        return "nested"
    kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    return f"{'without memory' if tensor.is_meta else kind}, shape {tuple(tensor.shape)}"


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """`UserError` names the first weights that hold NaN or infinity, which make a picture of one token."""
    for key, value in state.items():
        if value.is_floating_point() and value.itemsize > 1 and value.numel() and not value.is_meta:
            low, high = value.detach().aminmax()  # NaN passes through both; needs no copy, as `isfinite` does
            if not (low.isfinite() and high.isfinite()):
                raise UserError(
                    f"{where}: {key} holds numbers that are not finite ({float(low)}); the file is damaged, or comes "
                    "from a training that diverged"
                )


@contextmanager
def at_most(count: int, message: str) -> Iterator[None]:
    """Raises `UserError` when modules get more than `count` weights inside the block: a million layers take hours."""
    seen = itertools.count(1)

    def registered(*_: object) -> None:
        if next(seen) > count:
            raise UserError(f"{message} in the file")

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
