"""The one exception type that means "the input is wrong", as opposed to "consonar is wrong"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input. The message is one line with the key, the value and the choices; the command line exits with 2."""


class MissingSplit(UserError):
    """The data are there, but not the split that was asked for."""


def unknown(what: str, value: object, choices: Iterable[object]) -> UserError:
    """A `UserError` for a name that is not in a table: says which names are."""
    names = [str(choice) for choice in choices]
    close = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UserError(f"{what}: unknown {value!r}{hint}; choices: {', '.join(names)}")
