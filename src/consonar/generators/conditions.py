"""Operations on conditions of any kind: class ids (B,), caption features, prompts. Dataclasses go field by field."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from consonar.types import Condition


def num_rows(condition: Condition) -> int:
    """B."""
    return len(first_tensor(condition))


def first_tensor(condition: Condition) -> Tensor:
    """The tensor itself, or that of the first field: where batch size and device are read."""
    if isinstance(condition, Tensor):
        return condition
    value = getattr(condition, dataclasses.fields(condition)[0].name)
    assert isinstance(value, Tensor)
    return value


def concatenate(*conditions: Any) -> Any:
    """One condition with the rows of all, which are of one kind and length."""
    first = conditions[0]
    if isinstance(first, Tensor):
        return torch.cat(conditions)
    names = [item.name for item in dataclasses.fields(first)]
    return dataclasses.replace(first, **{name: torch.cat([getattr(c, name) for c in conditions]) for name in names})


def select(keep: Tensor, kept: Any, other: Any) -> Any:
    """Row b of `kept` where keep[b], else of `other`, which is of the same kind; keep (B,) bool."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b)

    if isinstance(kept, Tensor):
        return pick(kept, other)
    names = [item.name for item in dataclasses.fields(kept)]
    return dataclasses.replace(kept, **{name: pick(getattr(kept, name), getattr(other, name)) for name in names})


def rows(condition: Any, chosen: slice | Tensor) -> Any:
    """The condition of some rows."""
    if isinstance(condition, Tensor):
        return condition[chosen]
    names = [item.name for item in dataclasses.fields(condition)]
    return dataclasses.replace(condition, **{name: getattr(condition, name)[chosen] for name in names})
