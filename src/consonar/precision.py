"""Which precision a run multiplies in: decided once for a device. `float32.py` marks what stays in float32."""

import torch
from torch import nn

from consonar.cpu import timing
from consonar.cpu.timing import Way

PRECISIONS = ("auto", "fp32", "bf16")
PATIENCE = 10.0
"""Seconds that the choice may take on a busy machine: it halves the time of a step, and lasts for the run."""


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for float32; `name` is one of `PRECISIONS`.

    `auto`: bf16 where the hardware multiplies it natively, on a CPU only if that was also measured to be faster.
    """
    if name != "auto":
        low = name == "bf16"
    elif device.type == "cuda":
        low = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        low = cpu_multiplies_bf16() and timing.ours("bf16", autocast_ways, PATIENCE)
    return torch.bfloat16 if low else None


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
