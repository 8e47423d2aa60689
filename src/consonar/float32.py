"""Arithmetic that is float32 whatever a job multiplies in: searches, distances, losses, whose terms nearly cancel.

Fewer bits come from three sides: autocast, tensors that have them (weights in bf16), and on CUDA the TF32 that float32
products and convolutions may be rounded to (10 bits; cuDNN's default for convolutions).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

P = ParamSpec("P")
R = TypeVar("R")
LOW = (torch.bfloat16, torch.float16)


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """`function` under `exact` of its first tensor's device, with float32 in the place of tensors of fewer bits."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        # Any: what types the arguments have together (P) is not known of each.
        raised: Any = [raise_precision(value) for value in args]
        named: Any = {key: raise_precision(value) for key, value in kwargs.items()}
        with exact(device):
            return function(*raised, **named)

    return inside


def raise_precision(value: Any) -> Any:
    """float32 for a tensor with fewer bits, and anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def product_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's (..., out) of x (..., in), outside of training in float32 of weights and x with fewer bits too.

    Products are summed up in float32 anyway, so this only leaves the last rounding away: to bf16, a logit of 17 is off
    by up to 1/16 (benchmarks/precision.py).
    """
    weight, bias = layer.weight, layer.bias
    if weight.dtype not in LOW or torch.is_grad_enabled():
        return layer(x)
    if weight.is_cuda:
        rows = x.flatten(0, -2).to(weight.dtype)
        product = torch.mm(rows, weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    else:
        product = functional.linear(x.float(), weight.float())
    return product if bias is None else product + bias


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 tensors on `device` are float32: no autocast, no TF32."""
    with tf32(False, device), without_autocast(device):
        yield


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Inside, float32 products and convolutions on CUDA are TF32 or not; after it as before. Of the whole process.

    On a CPU they are float32, where `torch.set_float32_matmul_precision` may have given them fewer bits.
    """
    backends: Any = torch.backends  # Any: PyTorch declares no attributes of what is in there
    parts = (
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv,
    )  # fmt: skip
    before, on_cuda = [part.fp32_precision for part in parts], device.type == "cuda"
    if all((bits in ("tf32", "bf16")) == (allowed and on_cuda) for bits in (before[:3] if on_cuda else before[3:])):
        yield
        return
    try:
        level = torch.get_float32_matmul_precision()
    except RuntimeError:  # where both interfaces were used before, PyTorch does not say
        level = "high" if before[0] == "tf32" else "highest"
    wanted = ["tf32" if allowed else "ieee"] * 3 + ["ieee"] * 2
    try:
        set_float32("high" if allowed else "highest", allowed, wanted, parts)
        yield
    finally:
        set_float32(level, "tf32" in before[1:3], before, parts)


def set_float32(level: str, convolutions: bool, precisions: Sequence[str], parts: Sequence[Any]) -> None:
    """By PyTorch's older interface and by its newer one: torch.compile reads the older, and fails where they differ."""
    torch.set_float32_matmul_precision(level)
    torch.backends.cudnn.allow_tf32 = convolutions
    for part, precision in zip(parts, precisions, strict=True):
        part.fp32_precision = precision
