"""The command line: `consonar COMMAND ...`. Only this folder imports tyro; a command is the module of its name.

Wrong input prints one line and exits with 2; a run that fails by itself (a loss that is not finite) exits with 1.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from consonar import __version__
from consonar.cpu import hold_memory
from consonar.errors import AGAIN, BadImage, NonFiniteLoss, UserError, check_choice, is_out_of_memory, printable
from consonar.files.readers import home_expanded
from consonar.files.writers import no_room

COMMANDS = {
    "demo": "Pictures of a shipped generator; then plain AR, reAR and VA-pi on OpenMoji, trained, measured, on a page.",
    "tokenize": "Tokenise images into a token store, and their validation images into a second one beside it.",
    "train": "Train a recipe or a YAML file: consonar train rear-openmoji --out runs/mine [--optim.lr 1e-4 ...].",
    "plan": "Show whether a recipe fits on GPUs and how long it takes: consonar plan rear-l --gpus 8 [options].",
    "sample": "Draw images from a trained generator: consonar sample RUN --out samples.png|samples.npz|FOLDER.",
    "evaluate": "Measure samples (.npz or a folder of images), a trained generator over temperatures, or a tokenizer.",
    "sweep": "Train and measure the rows of a file over seeds, and compare them: consonar sweep FILE.yaml --seeds 3.",
    "diagnose": "Show on one page what a generator and its tokenizer get wrong together, and where, with intervals.",
    "report": "Write one self-contained HTML page that compares runs.",
    "import-tokens": "Turn the token files of RAR (.jsonl) or LlamaGen (.npy folders) into a token store.",
    "convert": "Convert a released weight file into a model folder, or (--to-official) a model folder back.",
    "models": "List the released models that can be loaded by name, or show where one was published.",
    "recipes": "List the recipes.",
    "doctor": "Show device, versions, kernels, packages, weights and cache: what a bug report needs.",
}
"""What each does. Its module is imported when it is called, for PyTorch takes a second."""
SHARED = ("train", "sample", "tokenize", "evaluate")
"""Those that several processes of torchrun do together."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is being done is left as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal and log takes every character
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with errors_told(words[0]), sigterm_raised(words[0]):
        name, *args = map(with_home, words)
        if name in ("-h", "--help"):
            say("usage: consonar COMMAND ...\n")
            for command, summary in COMMANDS.items():
                say(f"  {command:16}{summary}")
            say("\nOptions of a command: consonar COMMAND --help")
            return
        if name == "--version":
            say(__version__)
            return
        hold_memory()
        check_choice("command", name, COMMANDS)
        several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if several and name not in SHARED:
            raise UserError(f"{name}: is for one process; leave torchrun away, which is for {', '.join(SHARED)}")
        if os.environ.get("CONSONAR_MODELS"):
            import_module("consonar.cli.own_models").import_own_models()
        module = import_module(f"consonar.cli.{name.replace('-', '_')}")
        if name in ("train", "plan"):  # their options are those of the recipe that is named first
            module.command(args)
        else:
            module.command(import_module("consonar.cli.parsing").parse(module.Options, args, name))


@contextmanager
def errors_told(command: str) -> Iterator[None]:
    """Around a command: what is the user's to mend is one line and an exit status, anything else a traceback."""
    try:
        yield
    except BrokenPipeError:
        # Who read the output (`| head`) has left: nothing to tell, and nobody to tell it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell says it
    except UserError as error:
        skips = isinstance(error, BadImage) and command in ("tokenize", "train", "evaluate")
        way_out = "; --bad-images skip leaves such images out" if skips else ""
        stop(f"{error}{way_out}", 2)
    except NonFiniteLoss as error:
        stop(str(error), 1)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            notes = getattr(error, "__notes__", ["make batches, pictures or the model smaller"])
            stop(printable("; ".join(["not enough memory", *str(error).splitlines()[:1], *notes])), 2)
        if not isinstance(error, OSError):
            raise
        # The machine said no (full disk, no permission, a file where a folder should be): the user's to mend.
        place = f"{error.filename}: " if error.filename else ""
        why = no_room(error)
        reason = f"{why}; what was complete is kept" if why else error.strerror or str(error)
        stop(printable(place + reason), 2)
    except Terminated:
        stop("asked to end; the same command goes on", 143)  # as a shell says it
    except KeyboardInterrupt:
        stop("interrupted; the same command (train: with --resume, if its run folder is there) goes on", 130)


@contextmanager
def sigterm_raised(command: str) -> Iterator[None]:
    """Around a command: SIGTERM is an exception, so that what it has made is kept, and what is half made removed.

    `train` has its own way, which saves first. One that comes `AGAIN` seconds later acts at once. Signals belong to the
    main thread; one that is caught or ignored already stays so.
    """
    first = None

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Terminated
        if time.monotonic() - first > AGAIN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    caught = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if command == "train" or not caught:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), flush=True)


@contextmanager
def counting(what: str, wanted: bool = True) -> Iterator[Callable[..., None]]:
    """A progress callback (done, total, of what): a bar on a terminal where it is `wanted`, silence elsewhere."""
    console, columns = Console(stderr=True), (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal), transient=True) as progress:
        task = progress.add_task(escape(what), total=None)
        yield lambda done, total=None, of=what: progress.update(
            task, completed=done, total=total, description=escape(of)
        )


def with_home(word: str) -> str:
    """The word with a path from `~/` on written out, also behind `--option=`, where not every shell does it."""
    return re.sub(r"^(--[^=]+=)?~(?=/|$)", lambda found: f"{found[1] or ''}{home_expanded('~')}", word)


def stop(line: str, code: int) -> None:
    print(f"consonar: {line}", file=sys.stderr)
    sys.exit(code)
