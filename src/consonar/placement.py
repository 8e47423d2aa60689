"""Where data lie: which device a model is on, and how batches and conditions get there.

Which device a command uses is decided by `distributed.pick_device`; numbers are drawn by `consonar.seeding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def device_of(model: Any) -> torch.device:
    """The device of a model's weights; the CPU for what has none."""
    parameters = getattr(model, "parameters", tuple)
    return next((parameter.device for parameter in parameters()), torch.device("cpu"))


def to_device(record: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass with all tensors in it, on `device`; the CPU waits for no copy to an accelerator."""
    waits = device.type == "cpu"  # what is read on the CPU has to be there
    return map_tensors(record, lambda tensor: tensor.to(device, non_blocking=not waits))


def map_tensors(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same record with `function` applied to every tensor in it, in nested dataclasses and dicts too."""
    if isinstance(record, Tensor):
        return function(record)
    if isinstance(record, dict):
        return {key: map_tensors(value, function) for key, value in record.items()}
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        return record
    values = {item.name: map_tensors(getattr(record, item.name), function) for item in dataclasses.fields(record)}
    return dataclasses.replace(record, **values)
