"""From words to a call: tyro, with its boxed errors told in one line."""

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from consonar.errors import UserError

FLAGS = (tyro.conf.AvoidSubcommands,)


def parse(target: Any, args: Sequence[str], command: str) -> Any:
    """`tyro.cli`, with its boxed errors told in one line, and without options that are given twice."""
    check_repeats(args)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(target, args=list(args), prog=f"consonar {command}", config=FLAGS)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{command}: {flatten(captured.getvalue())}; see: consonar {command} --help") from stop


def check_repeats(args: Sequence[str]) -> None:
    """Raises `UserError` for an option that is given twice: the parser would take the last and say nothing."""
    given = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    if repeated := [word for index, word in enumerate(given) if word in given[:index]]:
        raise UserError(f"{repeated[0]}: given twice; keep one")


def check_read(command: Callable[..., None], given: Mapping[str, Any], unread: Sequence[str], why: str) -> None:
    """Raises `UserError` for the first of the options `unread` of a command that is not at its default."""
    for name in unread:
        if given[name] != inspect.signature(command).parameters[name].default:
            raise UserError(f"--{name.replace('_', '-')}: {given[name]!r} is read only {why}; leave it away")


def flatten(box: str) -> str:
    """The message and the first suggestion of a tyro error box, in one line."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first line is the box's title
        text = line.strip("│╭╮╰╯|+ ")
        if text and not text.strip("─-"):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    found = [" ".join(words) for words in paragraphs if words and "full helptext" not in " ".join(words)]
    return " (".join(found[:2]) + (")" if len(found) > 1 else "")
