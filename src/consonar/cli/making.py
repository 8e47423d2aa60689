"""Commands that make things: the demo, token stores, runs, samples."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from consonar.cli.console import counting, say
from consonar.cli.parsing import check_name, check_output, class_list, is_option, parse, take_option
from consonar.errors import UserError


def demo(*, out: Path = Path("runs/demo"), minutes: float = 18.0, seed: int = 0) -> None:
    """Pictures of the shipped generator; then plain AR, reAR and VA-pi on OpenMoji, trained, measured, on a page.

    Args:
        out: Folder to make; the page is OUT/report.html.
        minutes: How long the whole may take on this machine, which is measured first; more is better pictures.
        seed: Of all runs.
    """
    from consonar.demo.job import run_demo

    check_output(out)
    page = run_demo(out, minutes=minutes, seed=seed, say=say)
    say(f"the page: {page.resolve()}")


SHORT = {
    "--data": "--data.images", "--classes": "--data.classes", "--label-default": "--data.label-default",
    "--bad-images": "--data.bad-images", "--bad-images-limit": "--data.bad-images-limit",
}  # fmt: skip
"""Options of `train` that are called as those of `tokenize`."""


def full_name(word: str) -> str:
    """A word of `train`, with the whole name of an option that is called as in `tokenize`."""
    short = next((name for name in SHORT if is_option(word, name)), None)
    return word if short is None else SHORT[short] + word.removeprefix(short)


def train_command(args: Sequence[str]) -> None:
    """Train a recipe or a YAML file: consonar train rear-openmoji --out runs/mine [--optim.lr 1e-4 ...].

    Words that the options of the configuration do not have: `--data SPEC` is `--data.images SPEC`, `--classes` and
    `--label-default` are `--data.classes` and `--data.label-default`, and `--objective.rewards NAME=WEIGHT,...`
    replaces the rewards, whatever they are called.
    """
    from consonar.recipes import RECIPES, find_recipe
    from consonar.recipes.files import read_config
    from consonar.training.config import TrainConfig
    from consonar.training.run import train

    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            print("usage: consonar train RECIPE|FILE.yaml --out DIR [options]\n\nrecipes: " + ", ".join(RECIPES))
            print("\nAll options of one recipe: consonar train RECIPE --help")
            return
        raise UserError(f"train: name a recipe or a YAML file; recipes: {', '.join(RECIPES)}")
    is_file = Path(args[0]).suffix.lower() in (".yaml", ".yml", ".json")
    default = read_config(Path(args[0])) if is_file else find_recipe(args[0])
    args = [full_name(word) for word in args]
    args, rewards = take_option(args, "--objective.rewards")
    if rewards is not None:
        if weight := next((word for word in args if word.startswith("--objective.rewards.")), None):
            raise UserError(f"{weight}: given together with --objective.rewards, which names all rewards; keep one")
        default = with_rewards(default, rewards)

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

    chosen = parse(Train, args[1:], f"train {args[0]}")
    check_output(chosen.out)
    sys.path.append(str(Path.cwd()))  # a reward of one's own lies in the working directory more often than not
    folder = train(chosen.config, chosen.out, resume=chosen.resume, stop_at=chosen.stop_at, quiet=chosen.quiet)
    say(f"run folder: {folder}")


def with_rewards(config: Any, text: str) -> Any:
    """The configuration with the rewards of `NAME=WEIGHT,...`; `UserError` names the part that is not of this form.

    It is not checked whether the rest reads them: the parser changes that yet, and makes the whole anew.
    """
    from consonar.training.objectives.alignment import AlignmentConfig

    if not isinstance(config.objective, AlignmentConfig):
        raise UserError(f"objective.rewards: recipe {config.recipe!r} has no rewards")
    weights = {}
    for part in text.split(","):
        reward, equals, weight = part.strip().rpartition("=")
        if reward in weights:
            raise UserError(f"objective.rewards: {reward!r} is given twice, in {text!r}; keep one")
        try:
            weights[reward] = float(weight)
        except ValueError:
            equals = ""
        if not (equals and reward):
            raise UserError(f"objective.rewards: {part!r} is not NAME=WEIGHT, e.g. mse=1,ssim=0.5,my.module:mine=1")
    objective = copy.copy(config.objective)
    object.__setattr__(objective, "rewards", weights)
    return replace(config, objective=objective)


def sample_command(args: Sequence[str]) -> None:
    """Draw images from a trained generator: consonar sample RUN --out samples.png|samples.npz|FOLDER [options]."""
    from consonar.sampling.sample import SamplerConfig

    def sample(
        generator: tyro.conf.Positional[str],
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
            generator: Run folder, model folder, or a shipped generator (openmoji).
            out: samples.png (one grid), samples.npz (ADM layout), or a folder.
            sampler: How tokens are drawn.
            classes: Class ids or names, e.g. 0,3,3,7 or "Food & Drink" (default: all classes in turn).
            num_samples: How many images (default: one per class given). The classes given repeat in turn; without any
                all are drawn equally often, and of more classes than images those at equal steps.
            tokenizer: Name or folder (default: the one it was trained with).
            seed: Seed of the first image; image i has seed + i.
            batch_size: Images drawn together; does not change them.
            device: auto, cpu or cuda.
        """
        from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, read_origin
        from consonar.distributed import pick_device
        from consonar.sampling.job import make_job, run_job

        check_name(out)
        place = pick_device(device, "--device")
        model = load_generator(generator).to(place)
        own = load_own_tokenizer(generator) if tokenizer is None else None
        codec = (own or load_tokenizer(str(tokenizer), num_tokens=model.num_tokens)).to(place)
        origin = read_origin(generator)
        labels = class_list(classes, num_samples, model.num_classes, origin.class_names or ())
        job = make_job(model, codec, labels, seed=seed, sampler=sampler, source=generator, origin=origin)
        with counting("sample") as count:
            run_job(job, model, codec, out, batch_size=batch_size, progress=lambda done: count(done, len(labels)))
        say(f"{len(labels)} images: {out}")

    parse(sample, args, "sample")


def recipes() -> None:
    """List the recipes."""
    from consonar.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, function in RECIPES.items():
        say(f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}")
    say("\nAll options of one: consonar train RECIPE --help")
