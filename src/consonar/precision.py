"""What a job multiplies in: decided once for the job and its device, applied around it, written into what it makes.

`fp32`: float32, without the TF32 that cuDNN takes for float32 convolutions by default. `tf32`: float32 numbers, whose
products are TF32 (CUDA from compute capability 8.0 on). `bf16`: training runs under autocast and keeps its parameters
in float32; other jobs multiply with weights that are bf16, which halves what they read from memory. `float32.py` says
what stays in float32 in all of them, docs/gpu.md which is the default of which job.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn

from consonar.cpu import timing
from consonar.cpu.timing import Way
from consonar.errors import UserError, check_choice
from consonar.float32 import LOW, tf32, without_autocast

PRECISIONS = ("fp32", "tf32", "bf16")
CHOICES = ("auto", *PRECISIONS)
PATIENCE = 10.0
"""Seconds that the choice may take on a busy machine: it halves the time of a step, and lasts for the run."""
Model = TypeVar("Model")
Job = Literal["training", "sampling", "measuring"]
"""What `auto` depends on beside the device; measuring is tokenising and evaluation."""


def pick_precision(name: str, device: torch.device, key: str, job: Job) -> str:
    """One of `PRECISIONS` for one of `CHOICES`; `UserError`, about `key`, for another or one the device has not.

    `auto`: fp32 for measuring, whose numbers are compared with those of other machines; else bf16 on CUDA where the
    hardware multiplies it natively, and on a CPU for training alone, if it was also measured to be faster.
    """
    check_choice(key, name, CHOICES)
    if name == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise UserError(f"{key}: 'tf32' is of CUDA devices of compute capability 8.0 and more; choices: fp32, bf16")
    if name != "auto":
        return name
    if job == "measuring":
        return "fp32"
    if device.type == "cuda":
        low = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        low = job == "training" and cpu_multiplies_bf16() and timing.ours("bf16", autocast_ways, PATIENCE)
    return "bf16" if low else "fp32"


def autocast_type(precision: str) -> torch.dtype | None:
    """The type of a job under autocast; None for one without."""
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def multiplying(precision: str, device: torch.device, *, autocast: bool = False) -> Iterator[None]:
    """Inside, the process multiplies as `precision` says, whatever it did before and does after.

    `autocast`: in bf16 by autocast, for networks whose weights are float32; else by the weights (`with_weights`) alone.
    """
    low = torch.autocast(device.type, torch.bfloat16) if autocast and precision == "bf16" else without_autocast(device)
    with tf32(precision == "tf32", device), low:
        yield


def with_weights(model: Model, precision: str, device: torch.device) -> Model:
    """The model on `device` with bf16 weights where `precision` is that, else without: itself where it is so, moved, or
    a copy, which shares what does not change. What is no module of PyTorch's is its own affair, and one that does not
    cast stays in float32."""
    if not isinstance(model, nn.Module) or not casts(model):
        return model
    types = {parameter.dtype for parameter in model.parameters()}
    low = precision == "bf16"
    if torch.bfloat16 in types if low else types.isdisjoint(LOW):
        return model.to(device)
    shared = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
    copied = copy.deepcopy(model, shared).to(device, torch.bfloat16 if low else torch.float32)
    # With channels innermost, as tensor cores read them.
    if low and device.type == "cuda":
        copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among those declared
    return copied


def casts(model: object) -> bool:
    """Whether a tokenizer makes what it is given of its weights' type, and keeps its codes in float32: one that says
    which that is, by `dtype`. Of another only the products can be bf16, under autocast. Generators are given tokens."""
    return hasattr(model, "dtype") or not hasattr(model, "decode_embeddings")


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for it: AVX-512 BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_ways() -> tuple[Way, Way]:
    """An MLP forward and backward in float32 and under bf16 autocast, for `timing.ours`."""
    with torch.inference_mode(False):
        x, up, down = (torch.full(shape, 0.01) for shape in ((1024, 256), (1024, 256), (256, 1024)))

    def way(enabled: bool) -> Way:
        def run() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                weights = [weight.detach().requires_grad_() for weight in (up, down)]
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    out = nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, weights[0])), weights[1])
                torch.autograd.grad(out.float().sum(), weights)

        return run

    return way(False), way(True)
