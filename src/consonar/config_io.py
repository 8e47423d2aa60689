"""Frozen dataclasses to plain dicts and back, strictly: unknown keys and wrong types are refused, naming the path."""

import contextlib
import dataclasses
import functools
import json
import numbers
import os
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from consonar.errors import UserError, unknown
from consonar.json_types import Json, JsonMap

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
REPLACED_TABLES = ("rewards",)
"""Fields that hold a table of any keys; one in a file replaces its recipe's: what it does not name is not wanted."""


def to_dict(config: "DataclassInstance") -> Json:
    """Plain nested dict of a config, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: object, where: str, kind: type[Config], path: str = "") -> Config:
    """The config of type `kind` for a nested dict; `path` is that of its key in a larger one, with a dot behind it.

    `UserError` names the key, the value and the choices.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {path.removesuffix('.') or 'the file'}: expected a table of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(f"{where}: {unknown(f'{path}{key}', key, known)}")
    made: dict[str, object] = {}
    for name, value in values.items():
        key, options = f"{path}{name}", variants(known[name], hints[name])
        if options and value is not None:
            made[name] = from_dict(value, where, pick_variant(value, options, key, where), f"{key}.")
        else:
            made[name] = read_value(value, f"{where}: {key}", hints[name])
    for name, item in known.items():
        if name not in made and item.default is item.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {path}{name}: missing")
    try:
        return kind(**made)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def read_value(value: object, key: str, hint: object) -> object:
    """A value of the type `hint`; `UserError` says what is wrong and what was given."""
    if isinstance(value, str) and hint in (str, str | None):
        return value  # as it is: a path may hold bytes that are not UTF-8 (surrogates), which JSON has no place for
    try:
        with typed(key):
            return adapter(hint).validate_json(json.dumps(value), strict=True)
    except TypeError as error:  # what YAML has and JSON has not, such as a date
        message = "is neither number, text, list nor table of such; quote what is text"
        raise UserError(f"{key}: {value!r} {message}") from error


def checked_value(value: object, key: str, hint: object) -> object:
    """A value that Python gives, of the type `hint` as strictly as in a file, and as a file would hold it: a path is
    text, a list a tuple, NumPy's numbers are numbers. `UserError` as in `read_value`.
    """
    if isinstance(value, os.PathLike):
        value = os.path.join(".", os.path.expanduser(value))  # "x" may also be the name of something, Path("x") is not
    elif isinstance(value, list):
        value = tuple(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, int | float):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
    if kinds and not isinstance(value, hint):  # type: ignore[arg-type]
        raise UserError(f"{key}: expected a {kinds[0].__name__}, got {value!r}")  # type: ignore[union-attr]
    if not kinds and not (isinstance(value, str) and hint in (str, str | None)):  # as above
        with typed(key):
            adapter(hint).validate_python(value, strict=True)
    return value


@contextlib.contextmanager
def typed(key: str) -> Iterator[None]:
    """Says in one line what is not of the type that it should be."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([key, *map(str, first["loc"])])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{place}: {message}, got {first['input']!r}") from error


adapter = functools.cache(TypeAdapter)


def variants(item: dataclasses.Field[object], hint: object) -> "list[type[DataclassInstance]]":
    """The dataclasses that a field takes: those of the table that its metadata name, or those of its type."""
    if "kinds" in item.metadata:
        return list(item.metadata["kinds"]().values())
    options = typing.get_args(hint) or (hint,)
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def pick_variant(value: object, options: list[type[Config]], path: str, where: str) -> type[Config]:
    """Which dataclass of a union a table means, by its `kind`."""
    if len(options) == 1:
        return options[0]
    kinds = {f.default: option for option in options for f in dataclasses.fields(option) if f.name == "kind"}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:  # lists cannot be looked up
        raise UserError(f"{where}: {unknown(f'{path}.kind', kind, kinds)}")
    return kinds[kind]


def merge(base: JsonMap, changes: JsonMap) -> Json:
    """`base` with the nested `changes` on top; tables of another `kind`, or in `REPLACED_TABLES`, are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old, merged[key] = merged.get(key), value
        if (
            key not in REPLACED_TABLES
            and isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            merged[key] = merge(old, value)
    return merged
