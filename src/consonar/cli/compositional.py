"""What `evaluate --prompts` does: names prompts, scores, and shows the scores."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from consonar.cli import say
from consonar.distributed import World
from consonar.errors import UserError, unknown
from consonar.evaluation.benchmarks import read_scores
from consonar.evaluation.compositional import (
    COMPOSITIONAL,
    VALIDATION,
    PromptSettings,
    score_run,
    score_samples,
    validation_prompts,
)  # fmt: skip
from consonar.evaluation.results import check_place, check_unmeasured, write_results
from consonar.json_types import Json
from consonar.networks.scene_claims import scene_of
from consonar.sampling.prompt_files import read_prompt_file

STORED = "stored"
"""The prompts that samples were drawn for."""


def prompts_named(name: str) -> list[str]:
    """The prompts that `scenes-validation`, `scenes-validation:COUNT` or a file means."""
    kind, _, count = name.partition(":")
    if kind != VALIDATION and not Path(name).is_file():
        raise unknown("--prompts", name, [VALIDATION, f"{VALIDATION}:COUNT", "a file"])
    if kind != VALIDATION:
        return [*read_prompt_file(Path(name), scene_of).values()]
    if count and not (count.isdecimal() and 0 < int(count[:7]) <= 100_000):
        raise UserError(f"--prompts: {name!r}; COUNT is a number of prompts from 1 to 100,000")
    return validation_prompts(*([int(count)] if count else []))


def score_of_run(place: Path, prompts: str, settings: PromptSettings, *, overwrite: bool, world: World) -> None:
    if prompts == STORED:
        raise UserError(f"--prompts: {prompts!r} is of samples; for a run name {VALIDATION} or a file")
    check_unmeasured(place, COMPOSITIONAL, overwrite=overwrite)  # before scenes are made for their captions
    content = score_run(
        place, prompts_named(prompts), settings, name=prompts, overwrite=overwrite,
        progress=say if world.is_main else lambda text: None, world=world,
    )  # fmt: skip
    if world.is_main:
        print_scores(content, str(place))
        say(f"results: {place / COMPOSITIONAL}")


def score_of_samples(
    place: Path, prompts: str, tokenizer: str | None, settings: PromptSettings, out: Path | None, *, overwrite: bool
) -> None:
    if prompts != STORED:
        raise UserError(f"--prompts: {prompts!r} is of runs; samples have the prompts they were drawn for: {STORED}")
    if out is not None:
        check_place(out, overwrite=overwrite, key="--out")
    content = score_samples(place, tokenizer=tokenizer, seed=settings.seed, device=settings.device)
    print_scores(content, str(place))
    if out is not None:
        write_results(out, content, overwrite=overwrite, key="--out")
        say(f"results: {out}")


def show_benchmark(form: str, path: Path, prompts: str | None, out: Path | None, *, overwrite: bool) -> None:
    """What the scorer of a benchmark found, by category."""
    if out is not None:
        check_place(out, overwrite=overwrite, key="--out")
    content = read_scores(form, path, None if prompts is None else Path(prompts))
    theirs = content.get("as_their_scorer")
    print_scores({**content, "ceilings": {} if theirs is None else {"as their scorer": theirs}}, str(path))
    say(content["protocol"])
    if out is not None:
        write_results(out, content, overwrite=overwrite, key="--out")
        say(f"results: {out}")


def print_scores(content: Json, title: str) -> None:
    """Each number with its interval, beside its ceilings."""
    ceilings = content["ceilings"]
    for row in content.get("rows", [content]):
        drawn = ", temperature {temperature:g}, guidance {guidance_scale:g}" if "temperature" in row else ""
        at = title + drawn.format(**row)
        table = Table("", "%", "95 %", *ceilings, title=at, title_justify="left")
        for name, found in row["metrics"].items():
            low, high = found["interval"]
            tops = [percent(of.get(name)) for of in ceilings.values()]
            table.add_row(name, f"{100 * found['value']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", *tops)
        Console(highlight=False).print(table)


def percent(found: Json | float | None) -> str:
    value = found["value"] if isinstance(found, dict) else found
    return "" if value is None else f"{100 * value:.1f}"
