"""The command `recipes`."""

from dataclasses import dataclass

from consonar.cli import say
from consonar.recipes import RECIPES


@dataclass(frozen=True)
class Options:
    """None."""


def command(_: Options) -> None:
    width = max(map(len, RECIPES))
    for name, function in RECIPES.items():
        say(f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}")
    say("\nAll options of one: consonar train RECIPE --help")
