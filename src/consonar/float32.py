"""Arithmetic that stays in float32 inside an update in bf16: searches, distances, losses, whose terms nearly cancel."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
LOW = (torch.bfloat16, torch.float16)


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """`function` outside of the autocast of its first tensor's device, with float32 in the place of fewer bits."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device.type
        # Any: what types the arguments have together (P) is not known of each.
        raised: Any = [raise_precision(value) for value in args]
        named: Any = {key: raise_precision(value) for key, value in kwargs.items()}
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return function(*raised, **named)

    return exact


def raise_precision(value: Any) -> Any:
    """float32 for a tensor with fewer bits, and anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value
