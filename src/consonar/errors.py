"""The one exception type that means "the input is wrong", as opposed to "consonar is wrong"."""

import errno
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

MOST_CHOICES = 60
"""Choices that are listed."""
LONGEST_CAUSE = 200
"""Characters kept of what a parser said."""
OUT_OF_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "Storage size calculation overflowed", "out of memory",
    "STATUS_ALLOC_FAILED",
)  # fmt: skip
"""What PyTorch and CUDA's libraries say where memory does not suffice."""

AGAIN = 5.0
"""Seconds in which a signal that comes again says nothing new: launchers pass on what their whole group got."""


def printable(text: object) -> str:
    """In one line that every terminal and file takes: names of files need be neither UTF-8 nor one line."""
    line = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class UserError(ValueError):
    """Wrong input. The message is one line with the key, the value and the choices; the command line exits with 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class NotHere(UserError):
    """What was named is not on this machine; what is there and cannot be read is a `UserError` of another kind."""


class MissingSplit(UserError):
    """The data are there, but not the split that was asked for."""


class OnlyInOrder(UserError):
    """Shards that are read from their beginning alone."""


class BadImage(UserError):
    """One picture of many cannot be read."""


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient, the weights or a measurement is not finite; the message names the step, what to change,
    and the last checkpoint. The command line exits with 1."""


def unknown(what: str, value: object, choices: Iterable[object]) -> UserError:
    """A `UserError` for a name that is not in a table: says which names are."""
    names = [str(choice) for choice in choices]
    folded = {name.casefold(): name for name in reversed(names)}
    close = get_close_matches(str(value).casefold(), folded, n=1)
    hint = f" (did you mean {folded[close[0]]!r}?)" if close else ""
    more = f" and {len(names) - MOST_CHOICES} more" if len(names) > MOST_CHOICES else ""
    listed = f"choices: {', '.join(names[:MOST_CHOICES])}{more}" if names else "there are none"
    return UserError(f"{what}: unknown {value!r}{hint}; {listed}")


def no_folder(what: str, name: str | Path, choices: Iterable[object]) -> NotHere:
    """`unknown` for what may be the path of a folder, too; of what is written as one it says that none is there."""
    if isinstance(name, str) and (name == Path(name).name or name.startswith("hf:")):
        return NotHere(unknown(what, name, choices))
    return NotHere(f"{what}: no folder {name}; choices: {', '.join(map(str, choices))}")


def check_choice(what: str, value: object, choices: Collection[object]) -> None:
    """Raises `unknown` for a value that is not one of the choices, which may be the names of a table."""
    if value not in choices:
        raise unknown(what, value, choices)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is missing: Python's, the system's, or PyTorch's on any device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def reading(where: object, what: str, remedy: str = "", kind: type[UserError] = UserError) -> Iterator[None]:
    """Around a parser of bytes from outside: what it raises becomes one `kind` that begins with `where`, the file.

    Damaged bytes raise whatever they happen to spell (KeyError, struct.error, RecursionError, MemoryError, errors of
    zlib and of pickle), so this takes every `Exception`. Inside stands the parser alone: of anything else a mistake of
    ours would pass for a damaged file. `what` the file should be, e.g. "an .npz"; `remedy` ends the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind_of_error = type(error).__name__
        if isinstance(error, OSError):
            fault = f"cannot be read: {(error.strerror or str(error) or kind_of_error)[:LONGEST_CAUSE]}"
        elif is_out_of_memory(error):
            fault = f"cannot be read as {what}: it asks for more memory than there is"
        else:
            fault = f"not {what}, damaged or cut short ({f'{kind_of_error}: {error}'[:LONGEST_CAUSE]})"
        raise kind(f"{where}: {fault}{remedy and f'; {remedy}'}") from error


@contextmanager
def begins(start: str, instead_of: str = "") -> Iterator[None]:
    """Around what a value names: a `UserError` about it begins with the place where the value was given."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{start}{str(error).removeprefix(instead_of)}") from error


def must(where: str, holds: object, rule: str) -> None:
    """`UserError` with the rule that a model of the user's own breaks, unless it holds."""
    if not holds:
        raise UserError(f"{where}: {rule} (docs/own-models.md)")


@contextmanager
def needs(key: object, extra: str) -> Iterator[None]:
    """Around the import of packages of an extra; `UserError`, about `key`, where one is missing."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{key}: {error}; install with: pip install 'consonar[{extra}]'") from error


def one_line(error: BaseException) -> str:
    """What it is and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())
