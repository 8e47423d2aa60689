"""From words to a call: tyro, with its boxed errors told in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from consonar.cli import COMMANDS
from consonar.data.bad_images import LIMIT, POLICIES, BadImages
from consonar.errors import UserError, check_choice
from consonar.files.writers import check_writable
from consonar.options import Range, default

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Parsed = TypeVar("Parsed")
OUTPUTS = ("out", "to", "to_official")
"""Options that name what is made."""


@dataclass(frozen=True, kw_only=True)
class BadImageOptions:
    bad_images: str = "stop"
    """What is done about images that cannot be read: stop, or skip (leave them out, and list them in a .txt
    beside what is made)."""
    bad_images_limit: float = LIMIT
    """Share of images that may be left out before skip stops too; one image may always be."""

    def policy(self, listing: Path | None) -> BadImages:
        """What they say; `UserError` for a wrong option, or a limit that nothing reads."""
        limit = self.bad_images_limit
        check_choice("--bad-images", self.bad_images, POLICIES)
        Range(0, 1).check("--bad-images-limit", limit)
        if self.bad_images == "stop" and limit != LIMIT:
            raise UserError(f"--bad-images-limit: {limit} is read only with --bad-images skip; leave it away")
        return BadImages(self.bad_images, limit, listing)


BadImageGroup = Annotated[BadImageOptions, tyro.conf.arg(name="")]


def check_read(options: "DataclassInstance", unread: Sequence[str], why: str) -> None:
    """Raises `UserError` for the first of the options `unread` that is not at its default."""
    for name in unread:
        if (value := getattr(options, name)) != default(options, name):
            words = value if isinstance(value, tuple) else (value,)
            value = " ".join(map(str, words)) if isinstance(words[0], Path) else value
            raise UserError(f"--{name.replace('_', '-')}: {value!r} is read only {why}; leave it away")


def parse(kind: type[Parsed], args: Sequence[str], command: str, default: Parsed | None = None) -> Parsed:
    """The options of a command: `tyro.cli`, with its boxed errors told in one line, and without repeated options.

    `kind` is a dataclass of one option a field; `default` replaces its defaults.
    """
    check_repeats(args)
    check_empty(args)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            options = tyro.cli(
                kind, args=list(args), prog=f"consonar {command}", description=COMMANDS[command.split()[0]],
                config=(tyro.conf.AvoidSubcommands,), default=tyro.MISSING_NONPROP if default is None else default,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, UserError):  # of a configuration, which has said all there is to say
                raise cause from stop
            cause = cause.__context__
        raise UserError(f"{command}: {in_one_line(captured.getvalue())}; see: consonar {command} --help") from stop
    for name in OUTPUTS:
        check_output(vars(options).get(name), f"--{name.replace('_', '-')}")
    return options


def check_repeats(args: Sequence[str]) -> None:
    """Raises `UserError` for an option given twice, a switch on and off included: the parser would take the last."""
    given = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    options = [re.sub(r"^(--(?:.*\.)?)no-", r"\1", word) for word in given]
    for index, option in enumerate(options):
        if option in options[:index]:
            before = given[options.index(option)]
            twice = "given twice" if before == given[index] else f"given together with {before}"
            raise UserError(f"{given[index]}: {twice}; keep one")


MAY_BE_EMPTY = ("--data.validation-tokens",)


def check_empty(args: Sequence[str]) -> None:
    """Raises `UserError` for an empty value: as a path it would be the working directory (of an unset variable)."""
    for before, word in zip(["", *args], args, strict=False):
        option = before if before.startswith("--") else "the command"
        if word.startswith("--") and word.endswith("="):
            option, word = word.removesuffix("="), ""
        if word == "" and option.replace("_", "-") not in MAY_BE_EMPTY:
            raise UserError(f"{option}: given an empty value; give one, or leave it away")


KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}
"""What tyro calls the kinds of values, in words."""


def in_one_line(box: str) -> str:
    """The message and the first suggestion of a tyro error box, in one line."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first line is the box's title
        text = line.strip("│╭╮╰╯|+ ")
        if text and not text.strip("─-"):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    found = [" ".join(words) for words in paragraphs if words and "full helptext" not in " ".join(words)]
    told = " (".join(found[:2]) + (")" if len(found) > 1 else "")
    if missing := re.match(r"Missing value for argument '(\S+)'", told):
        return f"{missing[1]}: a value is missing"
    if wrong := re.match(r"Error parsing (\S+): .*?(['\"])(.*?)\2(?:\]| \().*Argument helptext: .*?\1 (\S+)", told):
        kinds = " or ".join(KINDS.get(kind, kind) for kind in reversed(wrong[4].split("|")))
        return f"{wrong[1]}: {wrong[3]!r} is not {kinds}"
    return told


def take_option(args: list[str], name: str) -> tuple[list[str], str | None]:
    """The words without `name VALUE` or `name=VALUE`, and the value; None where it is not given."""
    for index, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option == name and equals:
            return args[:index] + args[index + 1 :], value
        if option == name:
            if index + 1 == len(args):
                raise UserError(f"{name}: a value is missing")
            return args[:index] + args[index + 2 :], args[index + 1]
    return args, None


def pairs(words: Sequence[str], key: str, form: str) -> dict[str, str]:
    """{"a": "1"} <- ["a=1"]; `UserError` for a word that has not this `form`, and for a name that is given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.strip().partition("=")
        if not name or not equals:
            raise UserError(f"{key}: {word!r} is not {form}")
        if name in found:
            raise UserError(f"{key}: {name!r} is given twice, in {','.join(words)!r}; keep one")
        found[name] = value
    return found


def numbers_in(words: str, key: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError as error:
        raise UserError(f"{key}: {words!r} is not a list of numbers such as 1,0.9,0.8") from error


def check_output(out: Path | None, key: str) -> None:
    """Raises `UserError` for an output whose name is not UTF-8, which not all that write files take, for one at or
    below a link that leads nowhere, which some would follow and others replace, and where nothing can be written."""
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        here = sys.getfilesystemencoding()
        remedy = "" if here == "utf-8" else f", or set PYTHONUTF8=1: names are {here} under this locale"
        raise UserError(f"{key}: {str(out)!r} is not {here.upper()}; choose another name{remedy}") from error
    for place in [out, *out.parents] if out else []:
        if place.is_symlink() and not place.exists():
            raise UserError(f"{key}: {place} is a link to {place.readlink()}, which is not there; choose another name")
    if out is not None:
        check_writable(out, key)


def check_name(out: Path) -> None:
    """Raises `UserError` for an output without a name of its own: others are named after it, beside it."""
    if out.name in ("", ".."):
        raise UserError(f"--out: {str(out)!r} is not the name of something new; give one, such as {out / 'mine'}")
