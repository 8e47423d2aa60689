"""How a released state dict becomes ours and back: one record per released architecture, no logic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Key to shape of every tensor in a file."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Official:
    """A released architecture. All functions are pure; tensors are renamed, split or joined, never recalculated."""

    name: str
    """What `consonar convert` says that it found, e.g. "LlamaGen VQ tokenizer"."""
    component: Literal["tokenizer", "generator"]
    recognises: Callable[[Shapes], bool]
    """Whether a file with these keys and shapes is of this architecture; true for one architecture at most."""
    config: Callable[[Shapes], Any]
    """The configuration that the keys and shapes mean; what they cannot say (heads, image size) is as published."""
    to_ours: Callable[[State, Any], tuple[State, State]]
    """(official, config) -> ours, and what we do not use but need for the way back (a usage buffer, training heads)."""
    to_official: Callable[[State, State, Any], State]
    """(ours, unused, config) -> official; the inverse of `to_ours`, bit for bit."""


def same_keys(official: State, config: Any) -> tuple[State, State]:
    """`to_ours` where our keys are the file's and nothing is left over."""
    return dict(official), {}


def same_keys_back(ours: State, unused: State, config: Any) -> State:
    """`to_official` of `same_keys`."""
    return {**ours, **unused}


def num_indices(keys: Iterable[str], prefix: str) -> int:
    """How many entries the module list `prefix` has in a state dict with these keys."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key to shape, which is all that recognition looks at."""
    return {key: tuple(value.shape) for key, value in state.items()}
