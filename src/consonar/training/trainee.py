"""Trainee: a generator and the heads that exist during training only, behind one forward pass.

The heads live beside the generator, so that the exported checkpoint is the generator's own state dict and inference is
what it is without them.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from consonar.components import save_generator
from consonar.cpu.kernels import tune
from consonar.errors import UserError
from consonar.origin import Origin
from consonar.types import Condition, Generator, Prediction


@dataclass(frozen=True)
class HeadSpec:
    """One alignment head: which layer it reads, and which token's code it regresses."""

    name: str
    layer: int
    """0-based block whose output is read."""
    target: Literal["current", "next"]
    """`current`: at the position that reads token i; `next`: at the position that predicts token i."""
    code_dim: int
    depth: int
    """Linear maps; SiLU between them."""
    hidden: int
    """Width between the linear maps."""


def alignment_head(width: int, spec: HeadSpec) -> nn.Sequential:
    """MLP width -> hidden -> ... -> code_dim with `depth` linear maps (released weights: 3, at indices 0, 2, 4)."""
    widths = [width] + [spec.hidden] * (spec.depth - 1) + [spec.code_dim]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Trainee(nn.Module):
    """`forward(context, condition)` -> `Prediction` with taps (B, N, C) by head name."""

    def __init__(self, generator: Generator, heads: tuple[HeadSpec, ...] = ()):
        super().__init__()
        self.generator = tune(generator)
        self.specs = heads
        for spec in heads:
            if not 0 <= spec.layer < generator.num_layers:
                raise UserError(
                    f"objective: {spec.name} head at layer {spec.layer}, "
                    f"but the generator has layers 0..{generator.num_layers - 1}"
                )
        self.heads = nn.ModuleDict({spec.name: alignment_head(generator.width, spec) for spec in heads})

    def forward(self, context: Tensor, condition: Condition) -> Prediction:
        layers = tuple(spec.layer for spec in self.specs)
        logits, hidden = self.generator(context, condition, tap_layers=layers)
        prefix, length = self.generator.prefix_length, context.shape[1]
        taps = {}
        for spec in self.specs:
            start = prefix if spec.target == "current" else prefix - 1
            taps[spec.name] = self.heads[spec.name](hidden[spec.layer][:, start : start + length])
        return Prediction(logits, taps)

    def save(self, folder: Path, origin: Origin) -> None:
        """Writes the released component, the generator without heads, to `folder`."""
        save_generator(self.generator, folder, origin)

    def export(self, folder: Path, origin: Origin) -> None:
        """Writes the released component, the generator without heads, to model/ in the run `folder`."""
        self.save(folder / "model", origin)

    def parts(self) -> list[nn.Module]:
        """What is compiled, and sharded, each on its own."""
        return list(self.generator.blocks)
