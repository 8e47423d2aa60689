# ruff: noqa: E501  (the sentences of the page)
"""What VA-pi does on OpenMoji, against its controls, over seeds: python claims/vapi.py [--out runs/claims-vapi].

One start model (plain AR, stopped where its validation cross-entropy is lowest), then for every seed the same number of
updates on the same images with each method; frontiers of free-running samples for all. Every step that is finished is
skipped when the command is called again. Writes claims/results/vapi.json and the section on VA-pi of docs/results.md;
every number comes from result files.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from blanks import empty_share, patch_changes

from consonar.components import load_tokenizer
from consonar.cpu import hold_memory
from consonar.data.sources import open_source
from consonar.data.tokens import TokenStore, write_token_store
from consonar.distributed import machine_name
from consonar.evaluation.inputs import encode_reference, open_reference
from consonar.evaluation.results import is_measured, library_versions, read_results
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.files.writers import file_sha256, write_atomically
from consonar.recipes import find_recipe
from consonar.training.config import TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

DOCS = Path(__file__).parents[1] / "docs"
METHODS = {
    "ce": ("ce-openmoji", "CE control"),
    "vapi": ("vapi-openmoji", "VA-pi"),
    "spatial": ("vapi-spatial-openmoji", "VA-pi, spatial credit"),
    "ste": ("ste-openmoji", "straight-through"),
}
MATCHED = ("vapi", "spatial")
START_STEPS = 240
TEMPERATURES = (1.0, 0.8, 0.6)
FD = "FD(efficientnet-lite0) validation"
ENTROPY = "entropy (teacher-forced)"
EMPTY = "nearly empty (of the first 80)"
COLUMNS = (FD, "precision", "recall", "copy rate (tokens)", EMPTY, ENTROPY)
REWARDS = ("reward_mse", "reward_efficientnet-lite0")


def start_config(out: Path) -> TrainConfig:
    """Plain AR up to where its validation cross-entropy is lowest: later it copies more than it learns."""
    recipe = find_recipe("ar-openmoji")
    loop = replace(recipe.loop, steps=START_STEPS, validate_every=60, sample_every=0, save_every=0)
    return replace(recipe, data=replace(recipe.data, tokens=str(out / "tokens")), loop=loop)


def method_config(name: str, out: Path, *, seed: int, steps: int) -> TrainConfig:
    """The recipe of one method from the start model; nothing but the objective differs between methods."""
    recipe = find_recipe(METHODS[name][0])
    loop = replace(recipe.loop, steps=steps, validate_every=max(1, steps // 4), sample_every=0, save_every=0)
    return replace(recipe, init=str(out / "start"), seed=seed, loop=loop)


def make_runs(out: Path, seeds: int, steps: int) -> None:
    """Token stores, the start model, and every method at every seed."""
    tokenizer = load_tokenizer("openmoji-64")
    for split, folder, views in (("train", "tokens", "center_flip"), ("validation", "tokens-validation", "center")):
        if not (out / folder).exists():
            source = open_source("openmoji", split=split, image_size=tokenizer.image_size)
            write_token_store(out / folder, source, tokenizer, views=views)
    configs = {"start": start_config(out)}
    configs |= {
        f"{name}-{seed}": method_config(name, out, seed=seed, steps=steps) for seed in range(seeds) for name in METHODS
    }
    for run, config in configs.items():
        if not (out / run / "model").exists():
            started = time.monotonic()
            train(config, out / run, resume=(out / run / "config.json").exists(), quiet=True)
            print(f"trained {run}: {time.monotonic() - started:.0f} s", flush=True)


def measure_runs(out: Path, seeds: int, samples: int) -> None:
    """Frontiers; the start model also at the temperatures of the aligned models' entropies."""
    target = None  # opened once: the runs share it
    for run in ["start", *(f"{name}-{seed}" for seed in range(seeds) for name in METHODS)]:
        if is_measured(out / run):
            continue
        started = time.monotonic()
        match = [out / f"{name}-{seed}" for name in MATCHED for seed in range(seeds)] if run == "start" else []
        target = target or encode_reference(open_reference("openmoji-64", 64), load_tokenizer("openmoji-64"))
        settings = RunSettings(
            reconstruct=False, temperatures=TEMPERATURES, match=match, num_samples=samples, batch_size=128
        )
        evaluate_run(out / run, settings, target=target, overwrite=True)
        print(f"measured {run}: {time.monotonic() - started:.0f} s", flush=True)


def validations(run: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "validation/reward" in line]


def summarise(out: Path, seeds: int, steps: int, samples: int) -> dict[str, Any]:
    """All numbers of the page, by method and seed."""
    results = {path.parent.name: read_results(path.parent) for path in out.glob("*/results.json")}
    summary: dict[str, Any] = {
        "steps": steps, "seeds": seeds, "samples": samples, "temperatures": TEMPERATURES,
        "machine": machine_name("cpu"), "versions": library_versions(),
        "start_sha256": file_sha256(out / "start" / "model" / "model.safetensors"),
        "feature_network": results["start"]["feature_network"], "tokenizer": results["start"]["tokenizer"],
        "teacher_forced": {}, "frontier": {}, "patches": {},
    }  # fmt: skip
    store, tokenizer = TokenStore.open(out / "tokens-validation"), load_tokenizer("openmoji-64")
    for name in METHODS:
        lines = [validations(out / f"{name}-{seed}") for seed in range(seeds)]
        keys = [key for key in lines[0][-1] if key.startswith("validation/")]
        summary["teacher_forced"][name] = {
            key.removeprefix("validation/"): [line[-1][key] for line in lines] for key in keys
        }
        summary["teacher_forced"]["start"] = {key.removeprefix("validation/"): lines[0][0][key] for key in keys}
    for run, content in results.items():
        summary["patches"][run] = patch_changes(out / run, store, tokenizer)
        for row in content["rows"]:
            row["metrics"][EMPTY] = {"value": empty_share(out / run / row["samples"]), "spread": None}
        rows = [
            {
                "temperature": row["temperature"],
                "matched_to": row.get("matched_to"),
                **{key: row["metrics"][key] for key in COLUMNS},
            }
            for row in content["rows"]
        ]
        summary["frontier"][run] = rows
    return summary


def cell(values: list[float], digits: int = 3) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def page(summary: dict[str, Any], minutes: float) -> str:
    """The section of docs/results.md, from the summary."""
    seeds, forced, frontier = range(summary["seeds"]), summary["teacher_forced"], summary["frontier"]
    lines = [
        "## VA-pi on OpenMoji against its controls",
        "",
        f"Made by `make claims-vapi` in {minutes:.0f} minutes on {summary['machine']} (torch {summary['versions']['torch']}); numbers in",
        f"`claims/results/vapi.json`. One start model (plain AR, {START_STEPS} steps, weights {summary['start_sha256'][:12]}), then",
        f"{summary['steps']} updates of 32 images with each method, {summary['seeds']} seeds, the same images in the same order for all methods of a",
        f"seed. Samples: {summary['samples']} per row, the same classes and random numbers in every row. ± is the standard deviation over",
        "seeds; for the start model, which is one, the spread over four disjoint parts of the samples.",
        "",
        "### Under teacher forcing, on held-out images",
        "",
        "One draw of every token under the true context, decoded, against the image itself.",
        "",
        "| model | reward | MSE | perceptual | cross-entropy | entropy | KL to start |",
        "|---|---|---|---|---|---|---|",
    ]
    start = forced["start"]
    lines.append(
        f"| start | {start['reward']:.4f} | {-start['reward_mse']:.4f} | {-start['reward_efficientnet-lite0']:.4f} | "
        f"{start['cross_entropy']:.3f} | {start['entropy']:.3f} | 0 |"
    )
    for name, (_, title) in METHODS.items():
        values = forced[name]
        error = {key: [-v for v in values[key]] for key in REWARDS}
        lines.append(
            f"| {title} | {cell(values['reward'], 4)} | {cell(error['reward_mse'], 4)} | {cell(error['reward_efficientnet-lite0'], 4)} | "
            f"{cell(values['cross_entropy'])} | {cell(values['entropy'])} | {cell(values['kl'])} |"
        )
    lines += [
        "",
        "Seeds in which a method is better than the CE control of the same seed:",
        "",
        "| method | MSE | perceptual |",
        "|---|---|---|",
    ]
    for name, (_, title) in METHODS.items():
        if name != "ce":
            wins = [sum(forced[name][key][s] > forced["ce"][key][s] for s in seeds) for key in REWARDS]
            lines.append(f"| {title} | {wins[0]} of {len(seeds)} | {wins[1]} of {len(seeds)} |")
    lines += [
        "",
        "Drawn once more, patch by patch against the tokenizer's own reconstruction:",
        "",
        "| model | drawn patches that turn blank | blank patches that do not stay so |",
        "|---|---|---|",
    ]
    for name, title in (("start", "start"), *((name, title) for name, (_, title) in METHODS.items())):
        runs = ["start"] if name == "start" else [f"{name}-{seed}" for seed in seeds]
        changes = [[summary["patches"][run][key] for run in runs] for key in ("drawn to blank", "blank to drawn")]
        lines.append(f"| {title} | " + " | ".join(cell(values) for values in changes) + " |")
    lines += [
        "",
        "### Free-running samples: the frontier",
        "",
        "| model | temperature | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in frontier["start"]:
        if row["matched_to"] is None:
            cells = [
                f"{row[key]['value']:.3f}" + (f" ± {row[key]['spread']:.3f}" if row[key]["spread"] else "")
                for key in COLUMNS
            ]
            lines.append(f"| start | {row['temperature']:g} | " + " | ".join(cells) + " |")
    for name in MATCHED:
        rows = [row for row in frontier["start"] if (row["matched_to"] or "").rsplit("-", 1)[0] == name]
        if rows:
            cells = [cell([row[key]["value"] for row in rows]) for key in COLUMNS]
            temperature = cell([row["temperature"] for row in rows])
            lines.append(f"| start at the entropy of {METHODS[name][1]} | {temperature} | " + " | ".join(cells) + " |")
    for name, (_, title) in METHODS.items():
        for index, temperature in enumerate(summary["temperatures"]):
            rows = [frontier[f"{name}-{seed}"][index] for seed in seeds]
            lines.append(
                f"| {title} | {temperature:g} | "
                + " | ".join(cell([row[key]["value"] for row in rows]) for key in COLUMNS)
                + " |"
            )
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=2560)
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "vapi.json")
    args = parser.parse_args()
    hold_memory()
    started = time.monotonic()
    make_runs(args.out, args.seeds, args.steps)
    measure_runs(args.out, args.seeds, args.samples)
    clock = args.out / "minutes.json"  # summed over calls, since finished steps are skipped
    minutes = (json.loads(clock.read_text()) if clock.exists() else 0) + (time.monotonic() - started) / 60
    write_atomically(clock, lambda path: path.write_text(json.dumps(minutes)))
    summary = summarise(args.out, args.seeds, args.steps, args.samples) | {"minutes": minutes}
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(args.results, lambda path: path.write_text(text))
    write_section(args.page, page(summary, minutes))
    print(f"{args.page}: {minutes:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
