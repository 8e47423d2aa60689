"""What every configuration is checked for when it is made, from Python, a file or the command line alike."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from typing import Any

from consonar.errors import UserError, unknown

LARGEST = 1e6
"""Bound of a float option's magnitude where the next table has no other; beyond it float32 soon has no room."""
LARGEST_OF = {"lr": 10.0, "rope_base": 1e12}
SMALLEST_OF = {"temperature": 1e-6, "gumbel_temperature": 1e-6, "tau": 1e-6, "rope_base": 1e-6}
"""Least value over 0 of what is divided by, or raised to a power."""


def check_options(config: Any, prefix: str) -> None:
    """Raises `UserError`, naming `prefix` + field, for a number that cannot be calculated with and an unknown choice.

    Floats are finite and within the bounds above, integers within 64 bits, literals among their choices.
    """
    kind: Any = type(config)
    for name, choices in literals(kind).items():
        if getattr(config, name) not in choices:
            raise unknown(f"{prefix}{name}", getattr(config, name), [str(choice) for choice in choices])
    for item in dataclasses.fields(config):
        for key, value in numbers(item.name, getattr(config, item.name)):
            check_number(f"{prefix}{key}", value, item.name)


@functools.cache
def literals(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The choices of each field of `kind` that has a list of them."""
    hints = typing.get_type_hints(kind)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}


def numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers of a field by key: itself, or those in its table or list."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(key, part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def check_number(key: str, value: int | float, name: str) -> None:
    """Raises `UserError` for a number outside the bounds of the option `name`."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key}: {value} does not fit into 64 bits")
    if isinstance(value, int) and name not in LARGEST_OF | SMALLEST_OF:
        return
    largest, smallest = LARGEST_OF.get(name, LARGEST), SMALLEST_OF.get(name, 0.0)
    if not math.isfinite(value):
        raise UserError(f"{key}: {value} is not a finite number")
    if abs(value) > largest:
        raise UserError(f"{key}: {value} is too large; at most {largest:g}")
    if 0 < value < smallest:
        raise UserError(f"{key}: {value} is too small to calculate with; at least {smallest:g}")
