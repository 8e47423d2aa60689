"""What an option may be stands at its field, and is checked when a configuration is made.

A configuration is a frozen dataclass that inherits `Options`; what it takes is said in the types of its fields, by one
of the names below or as `Annotated[type, rule, ...]`. It does not matter whether values come from Python, a file or the
command line. What relates several fields in other ways than these rules is code in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeGuard

from consonar.config_io import checked_value
from consonar.errors import UserError, check_choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST = 1e6
"""Bound of a float's magnitude where its range has no upper end; beyond it float32 soon has no room."""
SMALLEST = 1e-6
"""Least value over 0 of what is divided by, or raised to a power."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of configurations: `UserError`, naming section and field, for a value that a rule of its field refuses."""

    section: ClassVar[str] = ""
    """What the configuration is called inside that of a run, as in `objective.noise`."""

    def __post_init__(self) -> None:  # a subclass that has one calls this first
        check_options(self, self.section and f"{self.section}.")


def check_options(config: DataclassInstance, prefix: str) -> None:
    """Raises `UserError`, naming `prefix` + field, for the first value that the type or a rule of its field refuses."""
    for name, hint in types(type(config)).items():
        object.__setattr__(config, name, checked_value(getattr(config, name), f"{prefix}{name}", hint))
    for name, rule in rules(type(config)):
        if isinstance(rule, OneOf | Range):
            for key, value in values(config, name):
                rule.check(f"{prefix}{key}", value)
        else:
            rule.check(config, name, prefix)


@functools.cache
def types(kind: type[DataclassInstance]) -> dict[str, object]:
    """The types of a dataclass's fields by name; of choices that of one, for the rule says them."""
    hints = typing.get_type_hints(kind)
    found = {item.name: hints[item.name] for item in dataclasses.fields(kind)}
    return {name: str if typing.get_origin(hint) is typing.Literal else hint for name, hint in found.items()}


@functools.cache
def rules(kind: type[DataclassInstance]) -> list[tuple[str, Rule]]:
    """The rules of a dataclass with the names of their fields; a rule may rely on those before it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = [(item.name, rule) for item in dataclasses.fields(kind) for rule in rules_in(hints[item.name])]
    return sorted(found, key=lambda pair: typing.get_args(Rule).index(type(pair[1])))


def rules_in(hint: object) -> Iterator[Rule]:
    """The rules in a type, also in one of the types that it is made of."""
    if isinstance(hint, Rule):
        yield hint
    elif typing.get_origin(hint) is typing.Literal:
        yield OneOf(typing.get_args(hint))
    else:
        for part in typing.get_args(hint):
            yield from rules_in(part)


def values(config: DataclassInstance, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a field by key: itself, or those in its table or list; none of a None that is the default."""
    value = getattr(config, name)
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((name, part) for part in value)
    elif value is not None or default(config, name) is not None:
        yield name, value


def default(config: DataclassInstance, name: str) -> object:
    """The default of a field; `MISSING` for one that has none, or makes it anew each time."""
    return type(config).__dataclass_fields__[name].default


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python's or of NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class OneOf:
    """The choices of an option; that of a `Literal` needs none."""

    choices: tuple[str, ...]

    def check(self, key: str, value: object) -> None:
        check_choice(key, value, self.choices)


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high` that are finite, and as integers have 64 bits; of a table or list, its numbers.

    `ends` are the brackets of the interval: round where the end is not part of it. `or_zero`: 0 is taken too. `note`
    is what else to say of a number outside.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    or_zero: bool = False
    note: str = ""

    def check(self, key: str, value: float) -> None:
        if fault := self.fault(value):
            raise UserError(f"{key}: {fault}")

    def fault(self, value: float) -> str:
        """What is wrong with a value, in words; empty where nothing is."""
        if isinstance(value, int) and abs(value) >= 2**63:
            return f"{value} does not fit into 64 bits"
        if not math.isfinite(value):
            return f"{value} is not a finite number"
        at_end = ("[" in self.ends and value == self.low) or ("]" in self.ends and value == self.high)
        if not (self.low < value < self.high or at_end or (self.or_zero and value == 0)):
            return f"{value} is {self.missed}{self.note and f'; {self.note}'}"
        if isinstance(value, float) and self.high == math.inf and abs(value) > LARGEST:
            return f"{value} is too large; at most {LARGEST:g}"
        return ""

    @property
    def missed(self) -> str:
        """What a number outside of the range is."""
        if self.high < math.inf:
            return f"not in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        if self.low in (0, 1):
            return "negative" if self.low == 0 and "[" in self.ends else "not positive"
        return f"too small; at least {self.low:g}{', or 0' if self.or_zero else ''}"


@dataclass(frozen=True)
class Divides:
    """`times` times the number goes into the field `whole` without rest; 0, where it is taken, does not matter."""

    whole: str
    times: int = 1
    into: str = ""
    """What it cuts the whole into, in words, where it must do more than divide it."""

    def check(self, config: DataclassInstance, name: str, prefix: str) -> None:
        value, whole = getattr(config, name), getattr(config, self.whole)
        if value and whole % (self.times * value):
            verb, into = ("cut", f" into {self.into}") if self.into else ("divide", "")
            raise UserError(f"{prefix}{name}: {value} does not {verb} {prefix}{self.whole} {whole}{into}")


@dataclass(frozen=True)
class ReadOnlyWith:
    """The option is read by some configurations only; in others it must be left at its default (`started_from`)."""

    is_read: Callable[[Any], bool]
    words: str
    """What would make it read; {} stands for the prefix."""

    def check(self, config: DataclassInstance, name: str, prefix: str) -> None:
        if not self.is_read(config):
            check_left(config, name, self.words.replace("{}", prefix), prefix)


Rule = OneOf | Range | Divides | ReadOnlyWith
"""What stands at a field, beside its type. `check` raises `UserError` for what it refuses: a value, called `key`; where
other fields matter, the field `name` of a configuration, called `prefix` + `name`."""


START: ContextVar[DataclassInstance | None] = ContextVar("START", default=None)


@contextmanager
def started_from(recipe: DataclassInstance) -> Iterator[None]:
    """Inside, an option that is left as the recipe has it, and that nothing reads after what was changed, gets its
    default: nobody asked for it. Only a value that the recipe has not is refused."""
    before = START.set(recipe)
    try:
        yield
    finally:
        START.reset(before)


def check_left(config: DataclassInstance, key: str, words: str, prefix: str = "") -> None:
    """Raises `UserError` where an option that is read only with `words` is not at its default; `a.b` is b inside a. One
    that is as in the recipe gets its default (`started_from`)."""
    *sections, name = key.split(".")
    owner = functools.reduce(getattr, sections, config)
    value, usual = getattr(owner, name), default(owner, name)
    of_recipe: object = START.get()
    for part in f"{prefix}{key}".split("."):
        of_recipe = getattr(of_recipe, part, dataclasses.MISSING)
    if value == of_recipe:
        object.__setattr__(owner, name, usual)
    elif value != usual:
        raise UserError(
            f"{prefix}{key}: {value!r} is read only with {words}; remove it, or set it to its default {usual!r}"
        )


Count = Annotated[int, Range(1)]
Depth = Annotated[int, Range(1, 1000)]
"""Layers: more are a slip of the keyboard, and take hours to make."""
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, "[)")]
Divisor = Annotated[float, Range(SMALLEST, LARGEST)]
"""What is divided by."""
