"""The command `recipes`."""

from collections.abc import Sequence

from consonar.cli.console import say
from consonar.cli.parsing import NoOptions, parse
from consonar.recipes import RECIPES


def command(args: Sequence[str]) -> None:
    parse(NoOptions, args, "recipes")
    width = max(map(len, RECIPES))
    for name, function in RECIPES.items():
        say(f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}")
    say("\nAll options of one: consonar train RECIPE --help")
