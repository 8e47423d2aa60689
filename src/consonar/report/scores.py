"""Whether pictures show what was asked: the compositional scores of runs by kind of caption, beside their ceilings."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from consonar.config_io import adapter
from consonar.errors import reading
from consonar.evaluation.compositional import COMPOSITIONAL, SCORE
from consonar.evaluation.results import Measurement, outdated, setting_text
from consonar.networks.scene_detector import detector_sha256
from consonar.report.folders import read_note
from consonar.report.records import Run

REMEDY = "score the run again"


class ScoreLine(NamedTuple):
    """What a run scored at one setting; without a run, what is to be had at most."""

    run: Run | None
    setting: str
    cells: list[str]


class ScoreTable(NamedTuple):
    """Headings, which are the kinds of captions behind their mean; lines; and what must be known to read them."""

    kinds: list[str]
    lines: list[ScoreLine]
    notes: list[str]


def score_table(runs: Sequence[Run]) -> ScoreTable | None:
    """Of the runs that were scored, on the prompts and by the detector of the first of them, with the ceilings of each
    tokenizer; None where none was. `UserError` for a damaged file."""
    kinds: dict[str, None] = {}
    found: list[tuple[Run | None, str, Mapping[str, Measurement]]] = []
    notes: list[str] = []
    seeds: dict[str, int | None] = {}
    prompts: tuple[list[str], float] | None = None
    detector: str | None = None
    ceilings: dict[str, tuple[str, Mapping[str, Mapping[str, Measurement]]]] = {}
    """By the fingerprint of a tokenizer its name, and what true pictures score as they are and through it."""
    for run in runs:
        path = run.path / COMPOSITIONAL
        content = read_note(path)
        if not content:
            continue
        with reading(path, "compositional scores", REMEDY):
            asked = content["prompts"]["texts"], content["prompts"]["per_prompt"]
            rows = []
            for row in content["rows"]:
                at = setting_text(float(row["temperature"]), float(row.get("guidance_scale", 1)))
                rows.append((at, metrics_of(row["metrics"])))
            limits = {name: metrics_of(metrics) for name, metrics in content["ceilings"].items()}
            codec, judge, seed = content["tokenizer"], content["detector_sha256"], content["rows"][0].get("seed")
        if why := outdated(content, run.weights_sha256):
            notes.append(f"The scores of {run.name} are not shown: they {why}.")
        elif prompts not in (None, asked):
            notes.append(f"The scores of {run.name} are not shown: they are of other prompts.")
        elif detector not in (None, judge):
            notes.append(f"The scores of {run.name} are not shown: another detector looked at its pictures; {REMEDY}.")
        else:
            prompts, detector = asked, judge
            ceilings.setdefault(codec["fingerprint"], (codec["name"], limits))
            seeds[run.name] = seed
            found += [(run, setting, metrics) for setting, metrics in rows]
    if prompts is None:
        return None
    if len(set(seeds.values())) > 1:
        listed = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        notes.append(f"Pictures were drawn from different seeds, which differ by chance as well: {listed}.")
    if detector != detector_sha256():
        notes.append(f"The detector is not this version's ({str(detector)[:12]}...), whose scores may be others.")
    for name in dict.fromkeys(name for _, limits in ceilings.values() for name in limits):
        of = [(tokenizer, limits[name]) for tokenizer, limits in ceilings.values() if name in limits]
        if all(metrics == of[0][1] for _, metrics in of):
            found.append((None, name, of[0][1]))
        else:
            found += [(None, f"{name} ({tokenizer})", metrics) for tokenizer, metrics in of]
    for _, _, metrics in found:
        kinds |= {name: None for name in metrics if name == SCORE or name.startswith(f"{SCORE} (")}
    lines = [ScoreLine(run, setting, [cell(metrics.get(kind)) for kind in kinds]) for run, setting, metrics in found]
    said = f"{len(prompts[0]):,} prompts, pictures of each: {prompts[1]:g}; in brackets intervals of 95 % over prompts."
    headings = [name.removeprefix(SCORE).strip(" ()") or "all" for name in kinds]
    return ScoreTable(headings, lines, [said, *notes])


def metrics_of(metrics: object) -> Mapping[str, Measurement]:
    read: dict[str, Measurement] = adapter(dict[str, Measurement]).validate_python(metrics)
    return read


def cell(measured: Measurement | None) -> str:
    """ "62 % [55, 68]"."""
    if measured is None:
        return "–"
    low, high = measured.interval or (measured.value, measured.value)
    return f"{100 * measured.value:.0f}\u00a0% [{100 * low:.0f}, {100 * high:.0f}]"
