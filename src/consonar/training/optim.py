"""AdamW with explicit parameter groups, the learning-rate schedule, and the moving average of weights."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from consonar.cpu import timing
from consonar.cpu.timing import Way
from consonar.errors import UserError
from consonar.options import CountOrZero, NotNegative, Options, Positive, Range, ShareBelowOne
from consonar.parallel import local


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options):
    """AdamW, warm-up and cosine."""

    section = "optim"

    lr: Annotated[float, Range(0, 10, "(]")] = 4e-4
    """Learning rate after warm-up."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the last step of a run that is longer than its warm-up."""
    warmup_steps: CountOrZero = 100
    """Steps of linear warm-up from 0."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment."""
    beta2: ShareBelowOne = 0.96
    """Decay of the second moment."""
    weight_decay: NotNegative = 0.03
    """On the weights of linear and convolutional layers only."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise UserError(f"optim.min_lr: {self.min_lr} is not between 0 and optim.lr {self.lr}")
        if self.lr * self.weight_decay > 1:
            raise UserError(
                f"optim.weight_decay: {self.weight_decay} times optim.lr {self.lr} is over 1: every step would turn "
                "weights to the other side of 0"
            )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear from 0 (exclusive) over `warmup_steps`, then half a cosine from `lr` to `min_lr` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights of linear and convolutional layers decay; biases, norms, embeddings and position tables do not."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": [p for p in decayed if p.requires_grad], "weight_decay": weight_decay},
        {"params": [p for p in others if p.requires_grad], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel on CUDA, and on a CPU where that was measured to be faster.

    Loading a resume checkpoint takes over what the run was started with, so that a run is calculated in one way.
    """
    device = next(model.parameters()).device
    fused = device.type == "cuda" or (device.type == "cpu" and timing.ours("adamw", adamw_ways))
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2), fused=fused
    )


def adamw_ways() -> tuple[Way, Way]:
    """A step of AdamW over the parameters of two small blocks, one by one and fused, for `timing.ours`."""
    shapes = [(768, 256), (256, 256), (1024, 256), (256, 1024), (768,), (256,), (1024,), (256,)] * 2

    def way(fused: bool) -> Way:
        parameters = [torch.full(shape, 0.1, requires_grad=True) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.01)
        return torch.optim.AdamW(parameters, fused=fused).step

    with torch.inference_mode(False):
        return way(False), way(True)


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; integer entries are copied."""
    state = model.state_dict()
    pairs = [(local(kept), local(state[key])) for key, kept in average.items()]
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([kept for kept, _ in floats], [value for _, value in floats], 1 - decay)
    for kept, value in pairs:
        if not kept.is_floating_point():
            kept.copy_(value)
