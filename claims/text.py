# ruff: noqa: E501  (the sentences of the page)
"""What the articles' parts do on captions, over seeds: python claims/text.py [--profile gpu] [--page].

A sweep (claims/text.yaml) done and written down as that of claims/photographs.py, whose code it is. Beside its
distances every finished run gets a compositional score (docs/text-to-image.md) over the same temperatures and guidance.
"""

from pathlib import Path
from statistics import mean

from photographs import FD, group_lines, groups, note_lines, opening, run

from consonar.components import load_tokenizer
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.distributed import pick_device
from consonar.evaluation.compositional import SCORE, PromptSettings, score_run, validation_prompts
from consonar.evaluation.results import Measurement
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.report.records import measurement_text
from consonar.sweeps.page import difference_rows, named, table
from consonar.sweeps.plan import Cell, Sweep
from consonar.sweeps.summary import Setting, over_seeds, value_cells
from consonar.sweeps.work import Place

NAMES = {"cpu": "text", "gpu": "text-gpu"}
SCENES = {"cpu": "scenes:40000", "gpu": "scenes:100000"}
TOKENIZER = "scenes-64"
PROMPTS, PER_PROMPT = 400, 1
"""Different captions of held-out scenes, and pictures of each."""
TITLES = {
    "text": ("The articles' parts on captions", "Made by `make claims-text`: 40,000 scenes with captions to train on; held-out scenes ask for pairings that none of them shows."),
    "text-gpu": ("The articles' parts on captions, at size", "Made by `make claims-text PROFILE=gpu`: 100,000 scenes with captions to train on."),
}  # fmt: skip
COLUMNS = (f"{FD} validation", SCORE, f"{FD} train", "precision", "recall")


def prepare(profile: str, sweep: Sweep, out: Path) -> None:
    """The tokens of a profile, where they are not there yet."""
    tokenizer = load_tokenizer(TOKENIZER)
    for split, name in (("train", "tokens"), ("validation", "tokens-validation")):
        path = Path("runs") / NAMES[profile] / name
        if not path.exists():
            source = open_source(SCENES[profile], split=split, image_size=tokenizer.image_size)
            write_token_store(path, source, tokenizer)


def score(place: Place, cell: Cell) -> None:
    """The compositional score of a trained run that is here, at the settings that its samples were drawn with."""
    path = place.out / "scores" / f"{cell.name}.json"
    if path.exists() or not place.is_trained(cell):
        return
    asked = cell.evaluated.settings
    settings = PromptSettings(
        per_prompt=PER_PROMPT, temperatures=asked.temperatures, guidance_scales=asked.guidance_scales,
        seed=asked.seed, batch_size=asked.batch_size, device=str(pick_device(cell.config.loop.device)),
    )  # fmt: skip
    texts = validation_prompts(PROMPTS)
    write_json(
        path, score_run(place.run(cell), texts, settings, name="scenes-validation", overwrite=True, progress=place.say)
    )


def scores_of(out: Path) -> dict[str, Json]:
    """By the name of the run."""
    return {path.stem: read_json(path) for path in sorted((out / "scores").glob("*.json"))}


def with_scores(results: dict[str, Json], scores: dict[str, Json]) -> dict[str, Json]:
    """The results with the score among the metrics of each setting."""
    for name, scored in scores.items():
        by_setting = {(row["temperature"], row["guidance_scale"]): row["metrics"] for row in scored["rows"]}
        for row in (results.get(name, {}).get("results") or {}).get("rows", []):
            row["metrics"] |= by_setting.get((row["temperature"], row["guidance_scale"]), {})
    return results


def mean_score(setting: Setting) -> float:
    """Of its rows, over their seeds."""
    found = [over_seeds(metrics[SCORE]).value for metrics in setting.values.values() if SCORE in metrics]
    return mean(found) if found else 0.0


def page(name: str, sweep: Sweep, results: dict[str, Json], out: Path) -> str:
    """The section of docs/results.md."""
    scores = scores_of(out)
    results = with_scores(results, scores)
    lines = opening(name, TITLES[name], sweep, results, out)
    if scores:
        known = next(iter(scores.values()))
        ceilings = [f"{of} {known['ceilings'][of][SCORE]['value']:.1%}" for of in known["ceilings"]]
        asked, each = len(known["prompts"]["texts"]), known["prompts"]["per_prompt"]
        lines += [f"The score is of {asked:,} held-out captions, {each} picture{'s' * (each > 1)} of each; the same of {', of '.join(ceilings)}."]  # fmt: skip
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
