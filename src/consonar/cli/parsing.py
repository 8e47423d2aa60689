"""From words to a call: tyro, with its boxed errors told in one line."""

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def is_option(word: str, name: str) -> bool:
    """Whether a word is the option `name`, with its value behind `=` or not."""
    return word == name or word.startswith(f"{name}=")


def take_option(args: list[str], name: str) -> tuple[list[str], str | None]:
    """The words without `name VALUE` or `name=VALUE`, and the value; None where it is not given."""
    if sum(is_option(word, name) for word in args) > 1:
        raise UserError(f"{name}: given twice; keep one")
    for index, word in enumerate(args):
        if word == name:
            if index + 1 == len(args):
                raise UserError(f"{name}: a value is missing")
            return args[:index] + args[index + 2 :], args[index + 1]
        if word.startswith(f"{name}="):
            return args[:index] + args[index + 1 :], word.removeprefix(f"{name}=")
    return args, None


def check_name(out: Path) -> None:
    """Raises `UserError` for a path without a name of its own: other files are named after it and lie beside it."""
    if out.name in ("", ".."):
        raise UserError(f"--out: {str(out)!r} is not the name of something new; give one, such as {out / 'mine'}")
