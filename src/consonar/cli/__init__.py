"""The command line: `consonar COMMAND ...`. Only this folder imports tyro; a command is a function with a docstring.

Wrong input prints one line and exits with 2; a run that fails by itself (a loss that is not finite) exits with 1.
"""

import errno
import sys
from collections.abc import Callable, Sequence

from consonar.cli.console import say
from consonar.cli.doctor import doctor
from consonar.cli.making import demo, recipes, sample_command, train_command
from consonar.cli.measuring import evaluate, report
from consonar.cli.models import convert, models
from consonar.cli.parsing import parse
from consonar.cli.tokenizing import import_tokens, tokenize
from consonar.cpu.memory import hold_memory
from consonar.errors import BadImage, UserError, printable, unknown

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "tokenize": tokenize,
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate,
    "report": report,
    "import-tokens": import_tokens,
    "convert": convert,
    "models": models,
    "recipes": recipes,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `consonar`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        say("usage: consonar COMMAND ...\n")
        for name, function in COMMANDS.items():
            say(f"  {name:16}{(function.__doc__ or '').splitlines()[0]}")
        say("\nOptions of a command: consonar COMMAND --help")
        return
    if args[0] == "--version":
        from consonar import __version__

        say(__version__)
        return
    try:
        hold_memory()
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        run_command(args[0], args[1:])
    except UserError as error:
        way_out = "; --bad-images skip leaves such images out" if isinstance(error, BadImage) else ""
        print(f"consonar: {error}{way_out}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # The machine said no (full disk, no permission, a file where a folder should be): the user's to mend.
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full; what was complete is kept" if full else error.strerror or str(error)
        print(f"consonar: {printable(place + reason)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("consonar: interrupted; the same command (train: with --resume) goes on", file=sys.stderr)
        sys.exit(130)


def run_command(name: str, args: list[str]) -> None:
    from consonar.training.aside import NonFiniteLoss

    try:
        if COMMANDS[name] in (train_command, sample_command):
            COMMANDS[name](args)
        else:
            parse(COMMANDS[name], args, name)
    except NonFiniteLoss as error:
        print(f"consonar: {error}", file=sys.stderr)
        sys.exit(1)
