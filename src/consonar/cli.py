"""The command line: `consonar COMMAND ...`. The only file that imports tyro; a command is a function with a docstring.

Wrong input prints one line and exits with 2; a run that fails by itself (a loss that is not finite) exits with 1.
"""

import contextlib
import errno
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from consonar.errors import UserError, unknown

FLAGS = (tyro.conf.AvoidSubcommands,)


def train_command(args: Sequence[str]) -> None:
    """Train a recipe or a YAML file: consonar train rear-openmoji --out runs/mine [--optim.lr 1e-4 ...]."""
    from consonar.config import TrainConfig, read_config
    from consonar.recipes import RECIPES, find_recipe
    from consonar.training.run import train

    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            print("usage: consonar train RECIPE|FILE.yaml --out DIR [options]\n\nrecipes: " + ", ".join(RECIPES))
            print("\nAll options of one recipe: consonar train RECIPE --help")
            return
        raise UserError(f"train: name a recipe or a YAML file; recipes: {', '.join(RECIPES)}")
    default = read_config(Path(args[0])) if args[0].endswith((".yaml", ".yml", ".json")) else find_recipe(args[0])

    @dataclass(frozen=True, kw_only=True)
    class Train:
        out: Path
        """Run folder to make."""
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default
        resume: tyro.conf.FlagCreatePairsOff[bool] = False
        """Go on with the run in --out from its last checkpoint."""
        stop_at: int | None = None
        """Stop early after this step (and resume later)."""
        quiet: tyro.conf.FlagCreatePairsOff[bool] = False
        """Print nothing."""

    chosen = parse(Train, args[1:], "train")
    folder = train(chosen.config, chosen.out, resume=chosen.resume, stop_at=chosen.stop_at, quiet=chosen.quiet)
    say(f"run folder: {folder}")


def tokenize(
    *,
    tokenizer: str,
    data: str,
    out: Path,
    split: str = "train",
    views: str = "center_flip",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Tokenise images into a token store.

    Args:
        tokenizer: Name (openmoji-64) or folder of the tokenizer.
        data: openmoji, a folder of images (sub-folders are classes), imagefolder:PATH, hf:owner/name.
        out: Folder of the token store to make.
        split: Which split of the data.
        views: Crops kept of each image: center, center_flip, ten_crop.
        batch_size: Crops per call of the encoder.
        device: auto, cpu, cuda or mps.
    """
    from consonar.data.images import open_source
    from consonar.data.tokens import write_token_store
    from consonar.distributed import pick_device
    from consonar.tokenizers import load_tokenizer

    place = pick_device(device)
    model = load_tokenizer(tokenizer).to(place)
    source = open_source(data, split=split, image_size=model.image_size)
    with counting("tokenize") as count:
        store = write_token_store(
            out, source, model, views=views, batch_size=batch_size, device=str(place), progress=count
        )
    say(
        f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens, {store.num_classes} classes: {out}"
    )


def import_tokens(*, format: str, data: Path, tokenizer: str, out: Path, labels: Path | None = None) -> None:
    """Turn the token files of RAR (.jsonl) or LlamaGen (.npy folders) into a token store.

    Args:
        format: rar-jsonl or llamagen-npy.
        data: The .jsonl file, or the folder of codes.
        tokenizer: Name or folder of the tokenizer that made the tokens.
        out: Folder of the token store to make.
        labels: Folder of label files (llamagen-npy).
    """
    from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
    from consonar.tokenizers import load_tokenizer

    formats = ("rar-jsonl", "llamagen-npy")
    if format not in formats:
        raise unknown("--format", format, formats)
    if (labels is None) != (format == "rar-jsonl"):
        raise UserError("--labels: needed by llamagen-npy and by nothing else")
    model = load_tokenizer(tokenizer)
    store = import_rar_jsonl(data, out, model) if labels is None else import_llamagen_npy(data, labels, out, model)
    say(f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens: {out}")


def sample_command(args: Sequence[str]) -> None:
    """Draw images from a trained generator: consonar sample RUN --out samples.png|samples.npz|FOLDER [options]."""
    from consonar.sampling.sample import SamplerConfig

    def sample(
        generator: tyro.conf.Positional[Path],
        *,
        out: Path,
        sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = SamplerConfig(),  # noqa: B008
        classes: str | None = None,
        num_samples: int | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        """Draw images from a trained generator into a .png grid, an .npz, or a folder of PNG files.

        Args:
            generator: Run folder or model folder.
            out: samples.png (one grid), samples.npz (ADM layout), or a folder.
            sampler: How tokens are drawn.
            classes: Class ids, e.g. 0,3,3,7 (default: all classes in turn).
            num_samples: How many images; classes repeat in turn (default: one per class given).
            tokenizer: Name or folder (default: the one it was trained with).
            seed: Seed of the first image; image i has seed + i.
            batch_size: Images drawn together; does not change them.
            device: auto, cpu, cuda or mps.
        """
        from consonar.distributed import pick_device
        from consonar.generators import load_generator, read_tokenizer_name
        from consonar.sampling.job import make_job, run_job
        from consonar.tokenizers import load_tokenizer

        place = pick_device(device)
        model = load_generator(generator).to(place)
        codec = load_tokenizer(tokenizer or read_tokenizer_name(generator)).to(place)
        labels = class_list(classes, num_samples, model.num_classes)
        job = make_job(model, codec, labels, seed=seed, sampler=sampler, source=str(generator))
        with counting("sample") as count:
            run_job(job, model, codec, out, batch_size=batch_size, progress=lambda done: count(done, len(labels)))
        say(f"{len(labels)} images: {out}")

    parse(sample, args, "sample")


def class_list(classes: str | None, num_samples: int | None, num_classes: int) -> Any:
    """Class of every image, (n,) int64, from `0,3,3,7` and a count; `UserError` for what is not a number."""
    import torch

    try:
        chosen = list(range(num_classes)) if classes is None else [int(word) for word in classes.split(",")]
    except ValueError as error:
        raise UserError(f"--classes: {classes!r} is not a list of class ids such as 0,3,3,7") from error
    if num_samples is not None and num_samples < 1:
        raise UserError(f"--num-samples: {num_samples} is not positive")
    count = len(chosen) if num_samples is None else num_samples
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)], dtype=torch.int64)


def evaluate(
    samples: tyro.conf.Positional[Path],
    *,
    reference: str,
    out: Path | None = None,
    temperatures: str = "1",
    num_samples: int = 2048,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure samples (.npz or a folder of images), or a trained run over a grid of temperatures.

    Args:
        samples: Samples, or a run folder: then it is sampled and RUN/results.json is written for `consonar report`.
        reference: openmoji-64, an .npz of images or statistics, a folder, hf:owner/name.
        out: Where to write the results of samples (JSON).
        temperatures: Of a run: the grid, e.g. 1,0.9,0.8.
        num_samples: Of a run: images drawn per temperature.
        draws: Disjoint parts whose spread is reported.
        seed: Of a run's first sample, and of the parts.
        batch_size: Images per call of a network.
        device: auto, cpu, cuda or mps.
        overwrite: Replace results that are there.
    """
    from consonar.distributed import pick_device

    place = str(pick_device(device))
    if (samples / "config.json").is_file() and (samples / "metrics.jsonl").is_file():
        from consonar.evaluation.frontier import evaluate_run

        if out is not None:
            raise UserError("--out: the results of a run are written into its folder; leave --out away")
        try:
            grid = [float(word) for word in temperatures.split(",")]
        except ValueError as error:
            raise UserError(f"--temperatures: {temperatures!r} is not a list of numbers such as 1,0.9,0.8") from error
        content = evaluate_run(
            samples, reference=reference, temperatures=grid, num_samples=num_samples, draws=draws,
            seed=seed, batch_size=batch_size, device=place, overwrite=overwrite, progress=say,
        )  # fmt: skip
        for row in content["rows"]:
            print_metrics(row["metrics"], f"temperature {row['temperature']:g}")
        say(f"results: {samples / 'results.json'}")
        return
    from consonar.evaluation.evaluate import evaluate as measure

    if out is not None and out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; choose another name, or add --overwrite")
    with counting("evaluate") as count:
        results = measure(
            samples, reference, draws=draws, seed=seed, batch_size=batch_size, device=place,
            progress=lambda name, done: count(done, None),
        )  # fmt: skip
    print_metrics({k: {"value": m.value, "spread": m.spread} for k, m in results.metrics.items()}, str(samples))
    for name, reason in results.unavailable.items():
        say(f"{name}: not measured ({reason})")
    if out is not None:
        results.to_json(out, overwrite=overwrite)
        say(f"results: {out}")


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    out: Path,
    title: str | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Write one self-contained HTML page that compares runs.

    Args:
        runs: One to six run folders.
        out: The page to write.
        title: Its title.
        overwrite: Replace a page that is there.
    """
    from consonar.report import write_report

    say(f"report: {write_report(list(runs), out, title=title, overwrite=overwrite)}")


def demo(*, out: Path = Path("runs/demo"), minutes: float = 13.0, seed: int = 0) -> None:
    """Plain AR against reAR on OpenMoji with the shipped tokenizer: trains both, measures both, writes a page.

    Args:
        out: Folder to make; the page is OUT/report.html.
        minutes: Budget on two CPU cores; more is better pictures.
        seed: Of both runs.
    """
    from consonar.demo import run_demo

    page = run_demo(out, minutes=minutes, seed=seed, say=say)
    say(f"the page: {page.resolve()}")


def recipes() -> None:
    """List the recipes."""
    from consonar.recipes import RECIPES

    for name, function in RECIPES.items():
        say(f"{name:24}{(function.__doc__ or '').splitlines()[0]}")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "tokenize": tokenize,
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate,
    "report": report,
    "import-tokens": import_tokens,
    "recipes": recipes,
}


def parse(target: Any, args: Sequence[str], command: str) -> Any:
    """`tyro.cli`, with its boxed errors told in one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(target, args=list(args), prog=f"consonar {command}", config=FLAGS)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{command}: {flatten(captured.getvalue())}; see: consonar {command} --help") from stop


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


def print_metrics(metrics: dict[str, dict[str, float | None]], title: str) -> None:
    from rich.table import Table

    table = Table("metric", "value", "spread", title=title, title_justify="left")
    for name, entry in metrics.items():
        spread = entry["spread"]
        table.add_row(name, f"{entry['value']:.4g}", "" if spread is None else f"{spread:.2g}")
    Console(highlight=False).print(table)


@contextlib.contextmanager
def counting(what: str) -> Any:
    """A progress callback (done, total): a bar on a terminal, silence elsewhere."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def say(text: str) -> None:
    print(text, flush=True)


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
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        run_command(args[0], args[1:])
    except UserError as error:
        print(f"consonar: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        print(f"consonar: the disk is full{place}; what was complete is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("consonar: interrupted", file=sys.stderr)
        sys.exit(130)


def run_command(name: str, args: list[str]) -> None:
    from consonar.training.loop import NonFiniteLoss

    try:
        if COMMANDS[name] in (train_command, sample_command):
            COMMANDS[name](args)
        else:
            parse(COMMANDS[name], args, name)
    except NonFiniteLoss as error:
        print(f"consonar: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
