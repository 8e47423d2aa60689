"""Frozen dataclasses to plain dicts and back, strictly: unknown keys and wrong types are refused, naming the path."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from consonar.errors import UserError, unknown

REPLACED_TABLES = ("rewards",)
"""Fields that hold a table of any keys; where a file changes one, it replaces that of its recipe."""


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], where: str, kind: Any) -> Any:
    """The config of type `kind` for a nested dict. `UserError` names the key, the value and the choices."""
    check_keys(values, kind, where)
    check_values(values, where)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: key path, what is wrong, what was given."""
    errors = error.errors()
    # A table is tried as every member of its union; `check_keys` has settled which one, so a wrong kind is noise.
    first = next((e for e in errors if e["loc"][-1:] != ("kind",)), errors[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    # pydantic puts the class names of union members into the path; field names are lower case
    path = ".".join(str(part) for part in first["loc"] if str(part)[:1].islower() or isinstance(part, int))
    if first["type"] == "missing":
        return f"{path}: missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{path}: {message}, got {first['input']!r}"


def variants(annotation: Any) -> list[type]:
    """The dataclasses that a field's type admits."""
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    options = typing.get_args(annotation) if is_union else (annotation,)
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def check_keys(values: Any, kind: type, where: str, path: str = "") -> None:
    """Raises `UserError` for a key that the dataclass `kind` does not have, naming the closest; recurses."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {path.removesuffix('.') or 'the file'}: expected a table of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {unknown(f'{path}{key}', key, known)}")
        options = variants(known[key])
        if options and value is not None:
            check_keys(value, pick_variant(value, options, f"{path}{key}", where), where, f"{path}{key}.")


def check_values(value: Any, where: str, path: str = "") -> None:
    """Raises `UserError` for what YAML has and JSON has not, such as a date; recurses."""
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_values(part, where, f"{path}.{key}".removeprefix("."))
    elif not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: {path}: {value!r} is neither number, text, list nor table; quote what is text")


def pick_variant(value: Any, options: list[type], path: str, where: str) -> type:
    """Which dataclass of a union a table means, by its `kind`."""
    kinds = {f.default: option for option in options for f in dataclasses.fields(option) if f.name == "kind"}
    if len(options) == 1:
        return options[0]
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:  # lists cannot be looked up
        raise UserError(f"{where}: {unknown(f'{path}.kind', kind, kinds)}")
    return kinds[kind]


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the nested `changes` on top.

    A table with another `kind` replaces the whole table, and so does one whose keys are the user's own
    (`REPLACED_TABLES`): what it does not name is not wanted, as on the command line.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = value
        if (
            key not in REPLACED_TABLES
            and isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            merged[key] = merge(old, value)
    return merged
