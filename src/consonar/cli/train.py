"""The command `train`, whose options are those of the recipe or file that is named first."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from consonar.cli.parsing import Parsed, check_repeats, pairs, parse, take_option
from consonar.data.mixture import store_paths
from consonar.data.store_format import read_metadata
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.model_folders import SHIPPED
from consonar.options import started_from
from consonar.recipes import RECIPES, find_recipe, read_config
from consonar.training.config import TrainConfig
from consonar.training.objectives.alignment import AlignmentConfig
from consonar.training.run import CONFIG, check_folder, train

SHORT = {
    "--data": "--data.images", "--classes": "--data.classes", "--label-default": "--data.label-default",
    "--bad-images": "--data.bad-images", "--bad-images-limit": "--data.bad-images-limit",
}  # fmt: skip
"""Options of `train` that are called as those of `tokenize`."""


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path
    """Run folder to make."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in --out from its last checkpoint."""
    resume_if_begun: tyro.conf.FlagCreatePairsOff[bool] = False
    """The same where --out holds the run, else begin it: one command for a job that is put back into a queue."""
    stop_at: int | None = None
    """Stop early after this step (and resume later)."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print nothing."""


def command(args: Sequence[str]) -> None:
    if args[:1] == ["--resume"] and not {"-h", "--help"} & {*args[1:2]}:  # train --resume RUN: all is in its folder
        run = Path(args[1]) if len(args) > 1 and not args[1].startswith("-") else None
        if run is None or not (run / CONFIG).is_file():
            wrong = "no run folder is named" if run is None else f"{run} holds no run"
            raise UserError(f"--resume: {wrong}; consonar train --resume RUN goes on with one as it was begun")
        args = [str(run / CONFIG), "--out", str(run), "--resume", *args[2:]]
    options = parse_run("train", args, Options, out=tyro.MISSING)
    if options is not None:
        config = options.config
        if args[0] in RECIPES and "--tokenizer" not in {word.partition("=")[0] for word in args}:
            config = of_tokens(config)
        resume = options.resume or (None if options.resume_if_begun else False)
        if resume is False:  # before a device is asked
            check_folder(options.config, options.out, resume)
        sys.path.append(str(Path.cwd()))  # a reward of one's own lies in the working directory more often than not
        train(config, options.out, resume=resume, stop_at=options.stop_at, quiet=options.quiet)


def of_tokens(config: TrainConfig) -> TrainConfig:
    """The configuration of a recipe with the tokenizer of the package that made its tokens."""
    if config.run == "generator" and config.data.tokens:
        store = home_expanded(store_paths(config.data.tokens)[0])
        made = read_metadata(store).tokenizer if store.is_dir() else None
        return replace(config, tokenizer=made) if made in SHIPPED["tokenizer"] else config
    return config


def parse_run(command: str, args: Sequence[str], kind: Callable[..., Parsed], **needed: object) -> Parsed | None:
    """The options of a command that a recipe or a file is named to first, whose options they are; None after its help.

    Beside those of the configuration: `SHORT`, and `--objective.rewards NAME=WEIGHT,...`, all rewards anew. `kind` is a
    dataclass with the field `config`; the fields `needed` have no default.
    """
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            out = " --out DIR" * ("out" in needed)
            print(f"usage: consonar {command} RECIPE|FILE.yaml{out} [options]\n\nrecipes: {', '.join(RECIPES)}")
            if out:
                print("\nTo go on with a run as it was begun: consonar train --resume RUN")
            print(f"\nAll options of one recipe: consonar {command} RECIPE --help")
            return None
        raise UserError(f"{command}: name a recipe or a YAML file; recipes: {', '.join(RECIPES)}")
    is_file = Path(args[0]).suffix.lower() in (".yaml", ".yml", ".json")
    config = read_config(Path(args[0])) if is_file else find_recipe(args[0])
    parted = [word.partition("=") for word in args[1:]]
    given = [SHORT.get(name, name) + equals + value for name, equals, value in parted]
    check_repeats(given)
    words, rewards = take_option(given, "--objective.rewards")
    if rewards is not None:
        if weight := next((word for word in words if word.startswith("--objective.rewards.")), None):
            raise UserError(f"{weight}: given together with --objective.rewards, which names all rewards; keep one")
        config = with_rewards(config, rewards)
    default = kind(config=config, **needed)
    with started_from(config):
        return parse(type(default), words, f"{command} {args[0]}", default)


def with_rewards(config: TrainConfig, text: str) -> TrainConfig:
    """The configuration with the rewards of `NAME=WEIGHT,...`; `UserError` names the part that is not of this form.

    It is not checked whether the rest reads them: the parser changes that yet, and makes the whole anew.
    """
    if not isinstance(config.objective, AlignmentConfig):
        raise UserError(f"objective.rewards: recipe {config.recipe!r} has no rewards")
    form = "NAME=WEIGHT, e.g. mse=1,ssim=0.5,my.module:mine=1"
    weights = {}
    for name, weight in pairs(text.split(","), "objective.rewards", form).items():
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise UserError(f"objective.rewards: '{name}={weight}' is not {form}") from error
    objective = copy.copy(config.objective)
    object.__setattr__(objective, "rewards", weights)
    return replace(config, objective=objective)
