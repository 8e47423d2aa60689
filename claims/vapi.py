# ruff: noqa: E501  (the sentences of the page)
"""What VA-pi does on OpenMoji, against its controls, over seeds: python claims/vapi.py [--methods ce,vapi] [--seeds 3].

A start model (plain AR, stopped where its validation cross-entropy is lowest), then for every seed the same number of
updates on the same images with each method; frontiers of free-running samples for all. Every finished run leaves a
small file in claims/results/vapi, and no run that has one is made again while the start's weights are the same: a few
rows at a time fill the table. Writes the section on VA-pi of docs/results.md; every number comes from these files.
"""

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from blanks import empty_share, patch_changes
from photographs import one_line, write_section

from consonar.components import load_tokenizer
from consonar.config_io import from_dict, to_dict
from consonar.cpu import hold_memory
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.distributed import machine_name
from consonar.errors import reading
from consonar.evaluation.inputs import encode_reference, open_reference
from consonar.evaluation.results import library_versions
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.files.readers import read_json
from consonar.files.writers import file_sha256, write_json
from consonar.recipes import find_recipe
from consonar.training.config import TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

RESULTS = Path(__file__).parent / "results" / "vapi"
REMEDY = "remove it, and it is made again"


@dataclass(frozen=True)
class Row:
    """A method: a recipe with changes of its objective."""

    recipe: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)


START, CONTROL = "start", "ce"
METHODS = {
    CONTROL: Row("ce-openmoji", "CE control"),
    "vapi": Row("vapi-openmoji", "VA-pi"),
    "spatial": Row("vapi-spatial-openmoji", "VA-pi, spatial credit"),
    "ste": Row("ste-openmoji", "straight-through"),
    "held": Row("vapi-openmoji", "VA-pi, entropy held", {"entropy": "position"}),
    "held-spatial": Row("isentropic-openmoji", "VA-pi, spatial credit, entropy held"),
    "mean-spatial": Row("vapi-spatial-openmoji", "VA-pi, spatial credit, mean entropy held", {"entropy": "mean"}),
    "sar": Row("sar-openmoji", "self-rollout without reward"),
}
MATCHED = ("vapi", "spatial", "held", "held-spatial")
"""Rows at whose entropy the start model is measured as well."""
START_STEPS, SEEDS = 240, 3
TEMPERATURES = (1.0, 0.8, 0.6)
FD = "FD(efficientnet-lite0) validation"
ENTROPY = "entropy (teacher-forced)"
EMPTY = "nearly empty (of the first 80)"
COLUMNS = (FD, "precision", "recall", "copy rate (tokens)", EMPTY, ENTROPY)
REWARDS = ("reward_mse", "reward_efficientnet-lite0")
Result = dict[str, Any]


def run_config(run: str, out: Path, steps: int) -> TrainConfig:
    """That of the start or of METHOD-SEED. The start stops where its validation cross-entropy is lowest (later it
    overfits); nothing but the objective differs between the methods."""
    if run == START:
        recipe = find_recipe("ar-openmoji")
        loop = replace(recipe.loop, steps=START_STEPS, validate_every=60, sample_every=0, save_every=0)
        return replace(recipe, data=replace(recipe.data, tokens=str(out / "tokens")), loop=loop)
    name, seed = run.rsplit("-", 1)
    recipe = find_recipe(METHODS[name].recipe)
    loop = replace(recipe.loop, steps=steps, validate_every=max(1, steps // 4), sample_every=0, save_every=0)
    objective = replace(recipe.objective, **METHODS[name].changes)
    return replace(recipe, init=str(out / START), seed=int(seed), loop=loop, objective=objective)


class Study:
    """Runs in a folder, and the files of those that are finished."""

    def __init__(self, out: Path, results: Path, steps: int, samples: int):
        self.out, self.results, self.steps, self.samples = out, results, steps, samples
        self.settings = {"start_steps": START_STEPS, "steps": steps, "samples": samples}
        self.tokenizer = load_tokenizer("openmoji-64")
        self.target: Any = None  # encoded once: the runs share it

    def result(self, run: str) -> Result | None:
        """What is known of a run; None for nothing, of other settings or configuration, or from another start."""
        path = self.results / f"{run}.json"
        if not path.exists():
            return None
        known = read_json(path, REMEDY)
        with reading(path, "a result of this study", REMEDY):
            settings, config, began = known["settings"], known["config"], known["start_sha256"]
        if settings != self.settings:
            return None
        if from_dict(config, str(path), TrainConfig) != run_config(run, Path(), self.steps):
            return None
        start = known if run == START else self.result(START)
        return known if start and start["start_sha256"] == began else None

    def weights(self, run: str) -> str | None:
        """The hash of those of a run in the folder."""
        path = self.out / run / "model" / "model.safetensors"
        return file_sha256(path) if path.exists() else None

    def keep(self, run: str, result: Result) -> None:
        write_json(self.results / f"{run}.json", result)

    def train(self, run: str) -> None:
        """The run, unless it is there; before it the token stores and the model that it starts from."""
        for split, folder, views in (("train", "tokens", "center_flip"), ("validation", "tokens-validation", "center")):
            if not (self.out / folder).exists():
                source = open_source("openmoji", split=split, image_size=self.tokenizer.image_size)
                write_token_store(self.out / folder, source, self.tokenizer, views=views)
        folder = self.out / run
        if not (folder / "model").exists():
            if run != START:
                self.train(START)
            config = run_config(run, self.out, self.steps)
            train(config, folder, resume=(folder / "config.json").exists(), quiet=True)

    def begin(self) -> None:
        """Trains and measures the start. Other weights than the committed runs began from, as another machine trains
        them, are measured in their place: runs are compared from one start alone, so that all are made anew."""
        self.train(START)
        known = self.result(START)
        if known and known["start_sha256"] != self.weights(START):
            print(f"{START}: trained to other weights than those of {self.results}; all is made anew")
            (self.results / f"{START}.json").unlink()
        self.make(START)

    def measure(self, run: str, **settings: Any) -> list[Result]:
        """Rows of its frontier."""
        self.target = self.target or encode_reference(open_reference("openmoji-64", 64), self.tokenizer)
        wanted = RunSettings(reconstruct=False, num_samples=self.samples, batch_size=128, **settings)
        rows = evaluate_run(self.out / run, wanted, target=self.target, overwrite=True)["rows"]
        for row in rows:
            empty = empty_share(self.out / run / row["samples"])
            row["metrics"][EMPTY] = {"value": empty, "spread": None}
        return [
            {
                "temperature": row["temperature"],
                "matched_to": row.get("matched_to"),
                "matched_sha256": self.weights(row["matched_to"]) if row.get("matched_to") else None,
            }
            | {key: row["metrics"][key] for key in COLUMNS}
            for row in rows
        ]

    def make(self, run: str) -> None:
        """Trains and measures a run that has no file yet, and writes it."""
        if self.result(run):
            return
        self.train(run)
        started, metrics = time.monotonic(), read_metrics(self.out / run / "metrics.jsonl")
        lines = [line for line in metrics if "validation/reward" in line]
        found = [
            {key.removeprefix("validation/"): v for key, v in line.items() if "validation/" in key} for line in lines
        ]
        store = TokenStore.open(self.out / "tokens-validation")
        self.keep(run, {
            "settings": self.settings, "machine": machine_name("cpu"), "versions": library_versions(),
            "config": to_dict(run_config(run, Path(), self.steps)),
            "weights_sha256": self.weights(run), "start_sha256": self.weights(START),
            "before": found[0] if found else None, "teacher_forced": found[-1] if found else None,
            "patches": patch_changes(self.out / run, store, self.tokenizer),
            "frontier": self.measure(run, temperatures=TEMPERATURES),
            "minutes": (metrics[-1]["time"] + time.monotonic() - started) / 60,
        })  # fmt: skip
        print(f"{run}: measured", flush=True)

    def match(self, runs: list[str]) -> None:
        """Measures the start also at the temperatures of the entropies of these runs, where they are in the folder."""
        known = self.result(START)
        assert known is not None  # made before
        weights = {run: result["weights_sha256"] for run in runs if (result := self.result(run))}
        rows = [
            row
            for row in known["frontier"]
            if row["matched_sha256"] == weights.get(row["matched_to"], row["matched_sha256"])
        ]
        missing = weights.keys() - {row["matched_to"] for row in rows}
        here = sorted(run for run in missing if self.weights(run) == weights[run] and self.weights(START))
        if away := sorted(missing - set(here)):
            print(f"not in {self.out} as measured, so that the start has no row at their entropy: {', '.join(away)}")
        if here:
            started = time.monotonic()
            rows += self.measure(START, temperatures=(), match=[self.out / run for run in here])
            known["minutes"] += (time.monotonic() - started) / 60
        if rows != known["frontier"]:
            self.keep(START, {**known, "frontier": rows})


def cell(values: list[float], digits: int = 3) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def page(results: dict[str, Result]) -> str:
    """The section of docs/results.md, from the files by run; a method is over the seeds that it has."""
    of = {name: [value for run, value in results.items() if run.rsplit("-", 1)[0] == name] for name in METHODS}
    of = {name: runs for name, runs in of.items() if runs}
    first, minutes = next(iter(of.values()))[0], sum(result["minutes"] for result in results.values())
    start = results[START]
    machines = sorted({f"{result['machine']} (torch {result['versions']['torch']})" for result in results.values()})
    counts, wanted = sorted({len(runs) for runs in of.values()}), 1 + SEEDS * len(METHODS)
    missing = ", ".join(f"`{name}`" for name in METHODS if name not in of)
    lines = [
        "## VA-pi on OpenMoji against its controls",
        "",
        f"**{len(results)} of {wanted} runs of `make claims-vapi` have a result** (`claims/results/vapi`), made in {minutes:.0f} minutes on {' and '.join(machines)}.",
        f"Methods without one: {missing or 'none'}. One start model (plain AR, {START_STEPS} steps; weights {start['start_sha256'][:12]}), then",
        f"{first['settings']['steps']} updates of 32 images with each method, {' or '.join(map(str, counts))} seeds, the same images in the same order for all methods of a",
        f"seed. Samples: {first['settings']['samples']} per row, the same classes and random numbers in every row. ± is the standard deviation over",
        "seeds; for the start model, which is one, the spread over four disjoint parts of the samples.",
        "",
        "### Under teacher forcing, on held-out images",
        "",
        "One draw of every token under the true context, decoded, against the image itself.",
        "",
        "| model | reward | MSE | perceptual | cross-entropy | entropy | KL to start |",
        "|---|---|---|---|---|---|---|",
    ]
    before = next(iter(of.values()))[0]["before"]
    lines.append(
        f"| start | {before['reward']:.4f} | {-before['reward_mse']:.4f} | {-before['reward_efficientnet-lite0']:.4f} | "
        f"{before['cross_entropy']:.3f} | {before['entropy']:.3f} | 0 |"
    )
    forced = {name: [run["teacher_forced"] for run in runs] for name, runs in of.items()}
    for name, values in forced.items():
        row = {key: [value[key] for value in values] for key in ("reward", "cross_entropy", "entropy", "kl", *REWARDS)}
        error = {key: [-v for v in row[key]] for key in REWARDS}
        lines.append(
            f"| {METHODS[name].title} | {cell(row['reward'], 4)} | {cell(error['reward_mse'], 4)} | {cell(error['reward_efficientnet-lite0'], 4)} | "
            f"{cell(row['cross_entropy'])} | {cell(row['entropy'])} | {cell(row['kl'])} |"
        )
    if CONTROL in of:
        lines += against_control(results, of)
    lines += [
        "",
        "Drawn once more, patch by patch against the tokenizer's own reconstruction:",
        "",
        "| model | drawn patches that turn blank | blank patches that do not stay so |",
        "|---|---|---|",
    ]
    groups = {"start": [start]} | {METHODS[name].title: runs for name, runs in of.items()}
    for title, runs in groups.items():
        changes = [[run["patches"][key] for run in runs] for key in ("drawn to blank", "blank to drawn")]
        lines.append(f"| {title} | " + " | ".join(cell(values) for values in changes) + " |")
    lines += [
        "",
        "### Free-running samples: the frontier",
        "",
        "| model | temperature | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in start["frontier"]:
        if row["matched_to"] is None:
            cells = [
                f"{row[key]['value']:.3f}" + (f" ± {row[key]['spread']:.3f}" if row[key]["spread"] else "")
                for key in COLUMNS
            ]
            lines.append(f"| start | {row['temperature']:g} | " + " | ".join(cells) + " |")
    for name in MATCHED:
        rows = [row for row in start["frontier"] if (row["matched_to"] or "").rsplit("-", 1)[0] == name]
        if rows:
            cells = [cell([row[key]["value"] for row in rows]) for key in COLUMNS]
            temperature = cell([row["temperature"] for row in rows])
            lines.append(
                f"| start at the entropy of {METHODS[name].title} | {temperature} | " + " | ".join(cells) + " |"
            )
    for name, runs in of.items():
        for index, temperature in enumerate(TEMPERATURES):
            rows = [run["frontier"][index] for run in runs]
            cells = [cell([row[key]["value"] for row in rows]) for key in COLUMNS]
            lines.append(f"| {METHODS[name].title} | {temperature:g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Protocol: {first['settings']['samples']:,} samples, efficientnet-lite0, against openmoji-64: FD to its validation images.",
    ]
    return "\n".join(lines)


def against_control(results: dict[str, Result], of: dict[str, list[Result]]) -> list[str]:
    """The table of differences from the CE control of the same seed."""
    by_name: dict[str, dict[str, Result]] = {}
    for run, value in results.items():
        if run != START:
            name, seed = run.rsplit("-", 1)
            by_name.setdefault(name, {})[seed] = value
    lines = [
        "",
        "Against the CE control of the same seed: in how many seeds a method's single draws are better, and the difference of FD free-running",
        "(below), ± its standard error over seeds: beyond chance is what exceeds 4.3 of them (three seeds, Student's t at 95 %).",
        "",
        "| method | MSE | perceptual | " + " | ".join(f"FD at {temperature:g}" for temperature in TEMPERATURES) + " |",
        "|" + "---|" * (len(TEMPERATURES) + 3),
    ]
    for name in of:
        seeds = sorted(by_name[name].keys() & by_name[CONTROL].keys())
        pairs = [(by_name[name][seed], by_name[CONTROL][seed]) for seed in seeds]
        if name == CONTROL or not pairs:
            continue
        wins = [
            sum(ours["teacher_forced"][key] > other["teacher_forced"][key] for ours, other in pairs) for key in REWARDS
        ]
        cells = [f"{count} of {len(pairs)}" for count in wins]
        for index in range(len(TEMPERATURES)):
            apart = [
                ours["frontier"][index][FD]["value"] - other["frontier"][index][FD]["value"] for ours, other in pairs
            ]
            error = f" ± {stdev(apart) / len(apart) ** 0.5:.1f}" if len(apart) > 1 else ""
            cells.append(f"{mean(apart):+.1f}{error}".replace("-", "−"))
        lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
    return lines


@one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/claims-vapi"))
    parser.add_argument("--methods", default=",".join(METHODS), help="rows to make: " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument(
        "--page", action="store_true", help="write the section from the results that are there, run nothing"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for key in ("seeds", "steps", "samples"):
        if getattr(args, key) < 1:
            parser.error(f"--{key}: {getattr(args, key)} is not in the range [1, inf)")
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}; choices: {', '.join(METHODS)}")
    hold_memory()
    study = Study(args.out, args.results, args.steps, args.samples)
    names = [name for name in METHODS if name in args.methods.split(",")]
    wanted = [f"{name}-{seed}" for seed in range(args.seeds) for name in names]
    if not args.page:
        if any(study.result(run) is None for run in wanted):
            study.begin()
        for run in wanted:  # seed by seed: whatever ends it, there is a table of fewer
            study.make(run)
        study.match([run for run in wanted if run.rsplit("-", 1)[0] in MATCHED])
    runs = [START, *(f"{name}-{seed}" for name in METHODS for seed in range(args.seeds))]
    results = {run: known for run in runs if (known := study.result(run))}
    if results.keys() <= {START}:
        parser.error(f"--results: no run of these settings is in {args.results}; without --page they are made")
    write_section("claims-vapi", page(results))


if __name__ == "__main__":
    main()
