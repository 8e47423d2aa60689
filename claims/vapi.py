# ruff: noqa: E501  (the sentences of the page)
"""What VA-pi does on OpenMoji, against its controls, over seeds: python claims/vapi.py [--methods ce,vapi] [--seeds 3].

A start model (plain AR, stopped where its validation cross-entropy is lowest; for some rows reAR of as many steps), then
for every seed the same number of updates on the same images with each method; frontiers of free-running samples for all.
Every finished run leaves a small file in claims/results/vapi, and no run that has one is made again while the start's
weights are the same: a few rows at a time fill the table. Writes the section on VA-pi of docs/results.md; every number comes from these files.
"""

import argparse
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from blanks import empty_share, patch_changes

from consonar.components import load_tokenizer
from consonar.cpu import hold_memory
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.distributed import machine_name
from consonar.evaluation.inputs import encode_reference, open_reference
from consonar.evaluation.results import library_versions
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.files.writers import file_sha256, write_atomically
from consonar.recipes import find_recipe
from consonar.training.config import TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

DOCS, RESULTS = Path(__file__).parents[1] / "docs", Path(__file__).parent / "results" / "vapi"


@dataclass(frozen=True)
class Row:
    """A method: a recipe with changes of its objective, from one of `STARTS`."""

    recipe: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    start: str = "start"

    @property
    def control(self) -> str:
        """The row of as many updates with cross-entropy alone from the same start."""
        return "ce" if self.start == "start" else "rear-ce"


STARTS = {"start": ("ar-openmoji", "start"), "rear-start": ("rear-openmoji", "reAR start")}
METHODS = {
    "ce": Row("ce-openmoji", "CE control"),
    "vapi": Row("vapi-openmoji", "VA-pi"),
    "spatial": Row("vapi-spatial-openmoji", "VA-pi, spatial credit"),
    "ste": Row("ste-openmoji", "straight-through"),
    "held": Row("vapi-openmoji", "VA-pi, entropy held", {"entropy": "position"}),
    "held-spatial": Row("isentropic-openmoji", "VA-pi, spatial credit, entropy held"),
    "mean-spatial": Row("vapi-spatial-openmoji", "VA-pi, spatial credit, mean entropy held", {"entropy": "mean"}),
    "sar": Row("sar-openmoji", "self-rollout without reward"),
    "annealed": Row("vapi-openmoji", "VA-pi, xi from 0.5 to 0", {"context_noise": 0.5, "noise_schedule": "linear"}),
    "rear-ce": Row("ce-openmoji", "reAR, CE control", start="rear-start"),
    "rear-vapi": Row("vapi-openmoji", "reAR, VA-pi", start="rear-start"),
    "rear-heads": Row("vapi-openmoji", "reAR, VA-pi, heads kept", {"embedding_weight": 1.0}, "rear-start"),
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
    """That of a start or of METHOD-SEED. A start stops where its validation cross-entropy is lowest (later it
    overfits); nothing but the objective differs between the methods from one start."""
    if run in STARTS:
        recipe = find_recipe(STARTS[run][0])
        loop = replace(recipe.loop, steps=START_STEPS, validate_every=60, sample_every=0, save_every=0)
        return replace(recipe, data=replace(recipe.data, tokens=str(out / "tokens")), loop=loop)
    name, seed = run.rsplit("-", 1)
    recipe, row = find_recipe(METHODS[name].recipe), METHODS[name]
    loop = replace(recipe.loop, steps=steps, validate_every=max(1, steps // 4), sample_every=0, save_every=0)
    objective = replace(recipe.objective, **row.changes)
    return replace(recipe, init=str(out / row.start), seed=int(seed), loop=loop, objective=objective)


def start_of(run: str) -> str:
    """What METHOD-SEED starts from."""
    return METHODS[run.rsplit("-", 1)[0]].start


class Study:
    """Runs in a folder, and the files of those that are finished."""

    def __init__(self, out: Path, results: Path, steps: int, samples: int):
        self.out, self.results, self.steps, self.samples = out, results, steps, samples
        self.settings = {"start_steps": START_STEPS, "steps": steps, "samples": samples}
        self.tokenizer = load_tokenizer("openmoji-64")
        self.target: Any = None  # encoded once: the runs share it

    def result(self, run: str) -> Result | None:
        """What is known of a run; None for nothing, of other settings, or from another start than is measured."""
        path = self.results / f"{run}.json"
        known = json.loads(path.read_text()) if path.exists() else None
        if not known or known["settings"] != self.settings:
            return None
        start = known if run in STARTS else self.result(start_of(run))
        return known if start and start["start_sha256"] == known["start_sha256"] else None

    def keep(self, run: str, result: Result) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(self.results / f"{run}.json", lambda path: path.write_text(text))

    def train(self, run: str) -> None:
        """The run, unless it is there; before it the token stores and the model that it starts from."""
        for split, folder, views in (("train", "tokens", "center_flip"), ("validation", "tokens-validation", "center")):
            if not (self.out / folder).exists():
                source = open_source("openmoji", split=split, image_size=self.tokenizer.image_size)
                write_token_store(self.out / folder, source, self.tokenizer, views=views)
        folder = self.out / run
        if not (folder / "model").exists():
            if run not in STARTS:
                self.train(start_of(run))
            config = run_config(run, self.out, self.steps)
            train(config, folder, resume=(folder / "config.json").exists(), quiet=True)

    def begin(self, start: str) -> None:
        """Trains and measures a start. Other weights than the committed runs began from, as another machine trains
        them, are measured in their place: runs are compared from one start alone, so that all are made anew."""
        self.train(start)
        known = self.result(start)
        if known and known["start_sha256"] != file_sha256(self.out / start / "model" / "model.safetensors"):
            print(f"{start}: trained to other weights than those of {self.results}; all from it is made anew")
            (self.results / f"{start}.json").unlink()
        self.make(start)

    def measure(self, run: str, **settings: Any) -> list[Result]:
        """Rows of its frontier."""
        self.target = self.target or encode_reference(open_reference("openmoji-64", 64), self.tokenizer)
        wanted = RunSettings(reconstruct=False, num_samples=self.samples, batch_size=128, **settings)
        rows = evaluate_run(self.out / run, wanted, target=self.target, overwrite=True)["rows"]
        for row in rows:
            empty = empty_share(self.out / run / row["samples"])
            row["metrics"][EMPTY] = {"value": empty, "spread": None}
        return [
            {"temperature": row["temperature"], "matched_to": row.get("matched_to")}
            | {key: row["metrics"][key] for key in COLUMNS}
            for row in rows
        ]

    def make(self, run: str) -> None:
        """Trains and measures a run that has no file yet, and writes it."""
        if self.result(run):
            return
        started = time.monotonic()
        self.train(run)
        start = self.out / (run if run in STARTS else start_of(run))
        lines = [line for line in read_metrics(self.out / run / "metrics.jsonl") if "validation/reward" in line]
        found = [
            {key.removeprefix("validation/"): v for key, v in line.items() if "validation/" in key} for line in lines
        ]
        store = TokenStore.open(self.out / "tokens-validation")
        self.keep(run, {
            "settings": self.settings, "machine": machine_name("cpu"), "versions": library_versions(),
            "start_sha256": file_sha256(start / "model" / "model.safetensors"),
            "before": found[0] if found else None, "teacher_forced": found[-1] if found else None,
            "patches": patch_changes(self.out / run, store, self.tokenizer),
            "frontier": self.measure(run, temperatures=TEMPERATURES),
            "minutes": (time.monotonic() - started) / 60,
        })  # fmt: skip
        print(f"{run}: {time.monotonic() - started:.0f} s", flush=True)

    def match(self, runs: list[str]) -> None:
        """Measures the start also at the temperatures of the entropies of these runs, where they are in the folder."""
        known = self.result("start")
        assert known is not None  # made before
        done = {row["matched_to"] for row in known["frontier"]}
        missing = [self.out / run for run in runs if run not in done and (self.out / run / "model").exists()]
        if missing and (self.out / "start" / "model").exists():
            started = time.monotonic()
            known["frontier"] += self.measure("start", temperatures=(), match=missing)
            known["minutes"] += (time.monotonic() - started) / 60
            self.keep("start", known)


def cell(values: list[float], digits: int = 3) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def page(results: dict[str, Result]) -> str:
    """The section of docs/results.md, from the files by run; a method is over the seeds that it has."""
    of = {name: [value for run, value in results.items() if run.rsplit("-", 1)[0] == name] for name in METHODS}
    of = {name: runs for name, runs in of.items() if runs}
    first, minutes = next(iter(of.values()))[0], sum(result["minutes"] for result in results.values())
    starts = sorted({result["start_sha256"][:12] for result in results.values()})
    machines = sorted({f"{result['machine']} (torch {result['versions']['torch']})" for result in results.values()})
    counts, wanted = sorted({len(runs) for runs in of.values()}), len(STARTS) + SEEDS * len(METHODS)
    missing = ", ".join(f"`{name}`" for name in METHODS if name not in of)
    lines = [
        "## VA-pi on OpenMoji against its controls",
        "",
        f"**{len(results)} of {wanted} runs of `make claims-vapi` have a result** (`claims/results/vapi`), made in {minutes:.0f} minutes on {' and '.join(machines)}.",
        f"Methods without one: {missing or 'none'}. One start model (plain AR, {START_STEPS} steps; weights {', '.join(starts)}), then",
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
    shown = {start: title for start, (_, title) in STARTS.items() if any(METHODS[name].start == start for name in of)}
    for start, title in shown.items():
        before = next(runs[0]["before"] for name, runs in of.items() if METHODS[name].start == start)
        lines.append(
            f"| {title} | {before['reward']:.4f} | {-before['reward_mse']:.4f} | {-before['reward_efficientnet-lite0']:.4f} | "
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
    lines += [
        "",
        "Seeds in which a method is better than the CE control of the same seed and start:",
        "",
        "| method | MSE | perceptual |",
        "|---|---|---|",
    ]
    by_seed = {tuple(run.rsplit("-", 1)): value for run, value in results.items() if "-" in run}
    for name in forced:
        if METHODS[name].control in forced and METHODS[name].control != name:
            ours_of, control_of = (
                {seed: value["teacher_forced"] for (run, seed), value in by_seed.items() if run == one}
                for one in (name, METHODS[name].control)
            )
            pairs = [(ours_of[seed], control_of[seed]) for seed in ours_of.keys() & control_of.keys()]
            wins = [sum(ours[key] > other[key] for ours, other in pairs) for key in REWARDS]
            lines.append(f"| {METHODS[name].title} | {wins[0]} of {len(pairs)} | {wins[1]} of {len(pairs)} |")
    lines += [
        "",
        "Drawn once more, patch by patch against the tokenizer's own reconstruction:",
        "",
        "| model | drawn patches that turn blank | blank patches that do not stay so |",
        "|---|---|---|",
    ]
    groups = {title: [results[start]] for start, title in shown.items() if start in results}
    groups |= {METHODS[name].title: runs for name, runs in of.items()}
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
    for start, title in shown.items():
        frontier = results[start]["frontier"] if start in results else []
        for row in frontier:
            if row["matched_to"] is None:
                cells = [
                    f"{row[key]['value']:.3f}" + (f" ± {row[key]['spread']:.3f}" if row[key]["spread"] else "")
                    for key in COLUMNS
                ]
                lines.append(f"| {title} | {row['temperature']:g} | " + " | ".join(cells) + " |")
        for name in MATCHED:
            rows = [row for row in frontier if (row["matched_to"] or "").rsplit("-", 1)[0] == name]
            if rows:
                cells = [cell([row[key]["value"] for row in rows]) for key in COLUMNS]
                temperature = cell([row["temperature"] for row in rows])
                lines.append(
                    f"| {title} at the entropy of {METHODS[name].title} | {temperature} | " + " | ".join(cells) + " |"
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
    return "\n".join(lines) + "\n"


def write_section(path: Path, text: str) -> None:
    """Replaces the section between the marks, or adds it at the end."""
    section = f"<!-- claims-vapi -->\n{text}<!-- /claims-vapi -->"
    before = path.read_text() if path.exists() else ""
    marks = re.compile(r"<!-- claims-vapi -->.*<!-- /claims-vapi -->", re.DOTALL)
    after = marks.sub(lambda _: section, before) if marks.search(before) else f"{before}\n{section}\n"
    write_atomically(path, lambda partial: partial.write_text(after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/claims-vapi"))
    parser.add_argument("--methods", default=",".join(METHODS), help="rows to make: " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=2560)
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}; choices: {', '.join(METHODS)}")
    hold_memory()
    study = Study(args.out, args.results, args.steps, args.samples)
    names = [name for name in METHODS if name in args.methods.split(",")]
    wanted = [f"{name}-{seed}" for seed in range(args.seeds) for name in names]
    for start in dict.fromkeys(start_of(run) for run in wanted if study.result(run) is None):
        study.begin(start)
    for run in wanted:  # seed by seed: whatever ends it, there is a table of fewer
        study.make(run)
    if any(METHODS[name].start == "start" for name in names):
        study.match([run for run in wanted if run.rsplit("-", 1)[0] in MATCHED])
    runs = [*STARTS, *(f"{name}-{seed}" for name in METHODS for seed in range(args.seeds))]
    write_section(args.page, page({run: known for run in runs if (known := study.result(run))}))
    print(args.page, flush=True)


if __name__ == "__main__":
    main()
