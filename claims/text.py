# ruff: noqa: E501  (the sentences of the page)
"""What the articles' parts do on captions, over seeds: python claims/text.py [--profile gpu] [--page].

A sweep (claims/text.yaml) done and written down as that of claims/photographs.py, whose code it is. Beside its
distances every finished run gets a compositional score (docs/text-to-image.md) over the same temperatures and guidance.
"""

from functools import cache
from pathlib import Path
from statistics import mean

from photographs import FD, group_lines, groups, make_store, note_lines, opening, run

from consonar.components import load_tokenizer, weights_sha256
from consonar.data.sources import open_source
from consonar.distributed import pick_device
from consonar.errors import reading
from consonar.evaluation.compositional import SCORE, PromptSettings, score_run, validation_prompts
from consonar.evaluation.results import Measurement
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.networks.scene_detector import detector_sha256
from consonar.report.records import measurement_text
from consonar.sweeps.page import difference_rows, named, table
from consonar.sweeps.plan import Cell, Sweep
from consonar.sweeps.summary import Setting, over_seeds, value_cells
from consonar.sweeps.work import Place, read_result

NAMES = {"cpu": "text", "gpu": "text-gpu"}
SCENES = {"cpu": "scenes:40000", "gpu": "scenes:100000"}
TOKENIZER = "scenes-64"
PROMPTS, PER_PROMPT = 400, 1
"""Different captions of held-out scenes, and pictures of each."""
REMEDY = "remove it, and it is made again"
TITLES = {
    "text": ("The articles' parts on captions", "Made by `make claims-text`: 40,000 scenes with captions to train on; held-out scenes ask for pairings that none of them shows."),
    "text-gpu": ("The articles' parts on captions, at size", "Made by `make claims-text PROFILE=gpu`: 100,000 scenes with captions to train on."),
}  # fmt: skip
COLUMNS = (f"{FD} validation", SCORE, f"{FD} train", "precision", "recall")


def prepare(profile: str, sweep: Sweep, out: Path) -> None:
    """The tokens of a profile, where they are not there yet; `UserError` for those of other scenes."""
    tokenizer = load_tokenizer(TOKENIZER).to(pick_device())
    for split, name in (("train", "tokens"), ("validation", "tokens-validation")):
        source = open_source(SCENES[profile], split=split, image_size=tokenizer.image_size)
        make_store(Path("runs") / NAMES[profile] / name, source, tokenizer)


@cache
def prompts() -> list[str]:
    return validation_prompts(PROMPTS)


def asked_of(cell: Cell) -> PromptSettings:
    """How a run is asked for its score: at the settings that its samples were drawn with."""
    asked = cell.evaluated.settings
    return PromptSettings(
        per_prompt=PER_PROMPT, temperatures=asked.temperatures, guidance_scales=asked.guidance_scales,
        seed=asked.seed, batch_size=asked.batch_size, device=str(pick_device(cell.config.loop.device)),
    )  # fmt: skip


def read_score(path: Path, cell: Cell, result: Json) -> Json | None:
    """The score of a run; None for one of other weights than its result, or that was asked or judged otherwise."""
    scored, settings, keys = read_json(path, REMEDY), asked_of(cell), ("per_prompt", "seed", "precision")
    with reading(path, "a score of this study", REMEDY):
        made_of = scored["checkpoint_sha256"], scored["prompts"]["texts"], scored["detector_sha256"]
        asked = [scored["config"][key] for key in keys]
    now = result["results"]["checkpoint_sha256"], prompts(), detector_sha256()
    return scored if made_of == now and asked == [getattr(settings, key) for key in keys] else None


def score(place: Place, cell: Cell) -> None:
    """The compositional score of a run with a result, where it is missing or of something else, and the run is here."""
    path, result = place.out / "scores" / f"{cell.name}.json", read_result(place, cell)
    if result is None or result["failure"] or (path.exists() and read_score(path, cell, result)):
        return
    run = place.run(cell)
    if place.is_trained(cell) and weights_sha256(run) == result["results"]["checkpoint_sha256"]:
        asked = asked_of(cell)
        write_json(path, score_run(run, prompts(), asked, name="scenes-validation", overwrite=True, progress=place.say))


def scores_of(sweep: Sweep, results: dict[str, Json], out: Path) -> tuple[dict[str, Json], list[str]]:
    """By the name of the run those of its result; the names of the runs whose score is of something else."""
    found: dict[str, Json | None] = {}
    for path in sorted((out / "scores").glob("*.json")):
        if (result := results.get(path.stem)) is not None and not result["failure"]:
            found[path.stem] = read_score(path, sweep.cells[path.stem], result)
    used = {name: scored for name, scored in found.items() if scored is not None}
    return used, [name for name in found if name not in used]


def with_scores(results: dict[str, Json], scores: dict[str, Json]) -> dict[str, Json]:
    """The results with the score among the metrics of each setting."""
    for name, scored in scores.items():
        by_setting = {(row["temperature"], row["guidance_scale"]): row["metrics"] for row in scored["rows"]}
        for row in results[name]["results"]["rows"]:
            row["metrics"] |= by_setting.get((row["temperature"], row["guidance_scale"]), {})
    return results


def mean_score(setting: Setting) -> float:
    """Of its rows, over their seeds."""
    found = [over_seeds(metrics[SCORE]).value for metrics in setting.values.values() if SCORE in metrics]
    return mean(found) if found else 0.0


def page(name: str, sweep: Sweep, results: dict[str, Json], out: Path) -> str:
    """The section of docs/results.md."""
    scores, others = scores_of(sweep, results, out)
    results = with_scores(results, scores)
    lines = opening(name, TITLES[name], sweep, results, out)
    if scores:
        known = next(iter(scores.values()))
        ceilings = [f"{of} {known['ceilings'][of][SCORE]['value']:.1%}" for of in known["ceilings"]]
        asked, each = len(known["prompts"]["texts"]), known["prompts"]["per_prompt"]
        lines += [f"The score is of {asked:,} held-out captions, {each} picture{'s' * (each > 1)} of each; the same of {', of '.join(ceilings)}."]  # fmt: skip
    if others:
        lines += [f"Left out: the score of {', '.join(others)}, which is of other weights, prompts or settings than the result."]  # fmt: skip
        print(lines[-1])
    lines += note_lines(sweep, results)
    for heading, summary in groups(sweep, results).items():
        grid = [setting for setting in summary.settings if setting.temperature is not None and setting.values]
        best = max(grid, key=mean_score, default=None)
        kinds = [column for column in (best.columns if best else ()) if column.startswith(f"{SCORE} (")]
        lines += [
            "", f"### {heading}", "",
            *group_lines(summary, results, COLUMNS, f"{FD} to held-out scenes / compositional score"),
        ]  # fmt: skip
        if best and kinds:
            at = [setting.title.removeprefix("at temperature ") for setting in grid]
            compared = [difference_rows(setting, [SCORE]) for setting in grid]
            if differences := {row: [cell for of in compared for cell in of.get(row, ["–"])] for row in compared[0]}:
                lines += ["", "Differences of the score by temperature, seed by seed:", "", *table(at, differences)]
            by_kind = {named(row, best): value_cells(best, row, kinds) for row in best.values}
            by_kind |= {
                of: [measurement_text(Measurement(found[kind]["value"]), percent=True) for kind in kinds]
                for of, found in known["ceilings"].items()
            }
            lines += ["", f"The score by kind of caption {best.title}, where the mean of these rows is highest:", ""]
            lines += table([kind[len(SCORE) + 2 : -1] for kind in kinds], by_kind)
    return "\n".join(lines)


if __name__ == "__main__":
    run(__doc__, NAMES, prepare, page, score)
