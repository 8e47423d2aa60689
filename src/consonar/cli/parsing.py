"""From words to a call: tyro, with its boxed errors told in one line."""

import contextlib
import inspect
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from consonar.cli.console import say
from consonar.errors import UserError, unknown
from consonar.origin import same_text

FLAGS = (tyro.conf.AvoidSubcommands,)


def parse(target: Any, args: Sequence[str], command: str) -> Any:
    """`tyro.cli`, with its boxed errors told in one line, and without options that are given twice."""
    check_repeats(args)
    check_empty(args)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(target, args=list(args), prog=f"consonar {command}", config=FLAGS)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, UserError):  # of a configuration, which has said all there is to say
                raise cause from stop
            cause = cause.__context__
        raise UserError(f"{command}: {flatten(captured.getvalue())}; see: consonar {command} --help") from stop


def check_repeats(args: Sequence[str]) -> None:
    """Raises `UserError` for an option that is given twice, a switch on and off included.

    The parser would take the last and say nothing.
    """
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


def check_bad_images(policy: str, limit: float) -> None:
    """Raises `UserError` for values of --bad-images and --bad-images-limit that are none, or that nothing reads."""
    from consonar.data.bad_images import LIMIT, check_policy

    check_policy(policy, limit, "--bad-images", "--bad-images-limit")
    if policy == "stop" and limit != LIMIT:
        raise UserError(f"--bad-images-limit: {limit} is read only with --bad-images skip; leave it away")


def check_output(out: Path | None, key: str = "--out") -> None:
    """Raises `UserError` for an output whose name is not UTF-8: not all that write files take such names."""
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}: {str(out)!r} is not UTF-8; choose another name") from error


def check_name(out: Path) -> None:
    """`check_output`, and `UserError` for a path without a name of its own: others are named after it, beside it."""
    check_output(out)
    if out.name in ("", ".."):
        raise UserError(f"--out: {str(out)!r} is not the name of something new; give one, such as {out / 'mine'}")


def class_list(classes: str | None, num_samples: int | None, num_classes: int, names: Sequence[str] = ()) -> Any:
    """Class of every image, (n,) int64, from ids or `names` such as `0,3,Objects` and a count.

    Names count in any case where no class has them in that case. A number that is an id and the name of another class
    is the id, which is said. `UserError` for a word that is neither the id nor the name of a class.
    """
    import torch

    from consonar.sampling.job import balanced_labels, check_count

    exact = {same_text(name): i for i, name in enumerate(names)}
    ids = exact | {str(i): i for i in range(num_classes)}
    count_of = Counter(map(str.casefold, exact))
    folded = {name.casefold(): i for name, i in exact.items() if count_of[name.casefold()] == 1}
    given = ",".join(map(str, range(num_classes or 1))) if classes is None else same_text(classes.strip())
    if num_classes == 0:  # refused where conditions are checked, as in Python
        given, ids = "0", {"0": 0}
    whole = given in ids or given.casefold() in folded  # a name may have commas
    chosen = []
    for word in [given] if whole else [word.strip() for word in given.split(",")]:
        label = ids.get(word, folded.get(word.casefold()))
        if label is None:
            raise unknown("--classes", word, [f"0..{num_classes - 1}", *names[:20]])
        if classes is not None and exact.get(word, label) != label:
            say(f"--classes: {word} is the id of {names[label]!r} here; the class {word!r} has the id {exact[word]}")
        chosen.append(label)
    labels = torch.tensor(chosen, dtype=torch.int64)
    if num_samples is None:
        return labels
    check_count(num_samples, "--num-samples")
    if classes is None:
        return balanced_labels(num_samples, len(labels))
    return labels[torch.arange(num_samples) % len(labels)]
