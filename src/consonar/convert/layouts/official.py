"""How a released state dict becomes ours and back: one record per released architecture, and what records share."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from consonar.tokenizers.vit import TransformerConfig
from consonar.types import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Key to shape of every tensor in a file."""
State = dict[str, Tensor]


def has(*keys: str, without: tuple[str, ...] = ()) -> Callable[[Shapes], bool]:
    """Recognises files with all of these keys, and none that begins with one of `without`."""
    return lambda shapes: shapes.keys() >= set(keys) and not any(key.startswith(without) for key in shapes)


def set_aside(unused: Callable[[str], bool]) -> Callable[[State, Any], tuple[State, State]]:
    """Our keys are the file's, but for those that we do not use."""

    def to_ours(official: State, config: Any) -> tuple[State, State]:
        aside = {key: value for key, value in official.items() if unused(key)}
        return {key: value for key, value in official.items() if key not in aside}, aside

    return to_ours


@dataclass(frozen=True)
class Official:
    """A released architecture. All functions are pure; tensors are renamed, split or joined, never recalculated."""

    name: str
    """What `consonar convert` says that it found, e.g. "LlamaGen VQ tokenizer"."""
    component: Literal["tokenizer", "generator"]
    recognises: Callable[[Shapes], bool]
    """Whether a file with these keys and shapes is of this architecture; true for one architecture at most."""
    config: Callable[[Shapes], ModelConfig]
    """The configuration that the keys and shapes mean; what they cannot say (heads, image size) is as published."""
    # Any: each record takes the configuration of its own model.
    to_ours: Callable[[State, Any], tuple[State, State]] = lambda official, config: (official, {})
    """(official, config) -> ours, and what we do not use but need for the way back (a usage buffer, training heads)."""
    to_official: Callable[[State, State, Any], State] = lambda ours, unused, config: {**ours, **unused}
    """(ours, unused, config) -> official; the inverse of `to_ours`, bit for bit."""


def num_indices(keys: Iterable[str], prefix: str) -> int:
    """How many entries the module list `prefix` has in a state dict with these keys."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def multipliers(shapes: Shapes, levels: str, weight: str, base: int) -> tuple[int, ...]:
    """Output channels of `weight` in each entry of the module list `levels`, as multiples of `base`."""
    return tuple(shapes[f"{levels}{index}.{weight}"][0] // base for index in range(num_indices(shapes, levels)))


def transformer(shapes: Shapes, side: str, image_size: int, num_patches: int) -> TransformerConfig:
    """The sizes of `encoder` or `decoder`, whichever `side` names, that cuts the image into `num_patches` (TiTok,
    AliTok). All published widths have heads of 64; a narrower transformer is read as one head."""
    width = shapes[f"{side}.ln_post.weight"][0]
    return TransformerConfig(
        width=width,
        num_layers=num_indices(shapes, f"{side}.transformer."),
        num_heads=max(1, width // 64),
        patch_size=image_size // math.isqrt(num_patches),
    )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key to shape, which is all that recognition looks at."""
    return {key: tuple(value.shape) for key, value in state.items()}
