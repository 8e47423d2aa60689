"""The main job on real data: plain AR and reAR on OpenMoji, each then post-trained by VA-pi and by its control.

Same seed, data order and budget for the runs of a comparison; one page at the end.

Every step that is finished is skipped when the demo is called again, so that an interrupted one goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from consonar.checkpoint import write_atomically
from consonar.config import TrainConfig
from consonar.data.images import open_source
from consonar.data.tokens import write_token_store
from consonar.distributed import pick_device
from consonar.errors import UserError
from consonar.evaluation.evaluate import encode_reference, open_reference
from consonar.evaluation.frontier import evaluate_run
from consonar.outside import read_json
from consonar.recipes import ar_openmoji, ce_openmoji, rear_openmoji, vapi_spatial_openmoji
from consonar.report import write_report
from consonar.tokenizers import load_tokenizer
from consonar.training.run import train

TOKENIZER = "openmoji-64"
STEPS_PER_MINUTE = 21
"""Optimiser steps of each training run per minute of budget: what two CPU cores manage with all the rest included."""
UPDATES_PER_MINUTE = 4
"""Updates of each post-training run per minute of budget."""
TEMPERATURES = (1.0, 0.7)
NUM_SAMPLES = 512
RUNS = {"plain-ar": ar_openmoji, "rear": rear_openmoji}
POST_TRAINING = {"ce": ce_openmoji, "vapi": vapi_spatial_openmoji}


def demo_config(name: str, out: Path, *, steps: int, seed: int) -> TrainConfig:
    """The recipe of one run, at the demo's budget."""
    recipe = RUNS[name]()
    return replace(
        recipe,
        recipe=name,
        seed=seed,
        data=replace(recipe.data, tokens=str(out / "tokens")),
        loop=replace(
            recipe.loop, steps=steps, validate_every=max(1, steps // 8), sample_every=0, save_every=max(1, steps // 4)
        ),
    )


def post_training_config(start: str, name: str, out: Path, *, steps: int, seed: int) -> TrainConfig:
    """VA-pi or its control from the run `start`, at the demo's budget."""
    recipe = POST_TRAINING[name]()
    return replace(
        recipe,
        recipe=f"{start}-{name}",
        seed=seed,
        init=str(out / start),
        loop=replace(recipe.loop, steps=steps, log_every=2, validate_every=max(1, steps // 2), save_every=steps),
    )


def run_demo(out: Path, *, minutes: float, seed: int, say: Callable[[str], None]) -> Path:
    """Makes the token stores, trains and measures all runs, writes `out`/report.html and returns its path.

    `minutes` sets the number of steps (not a clock: the same budget gives the same result on any machine). Raises
    `UserError` when `out` holds a demo with another budget or seed, or something else.
    """
    steps = round(minutes * STEPS_PER_MINUTE) if math.isfinite(minutes) else 0
    if steps < 8:
        raise UserError(f"--minutes: {minutes} is too short; at least {8 / STEPS_PER_MINUTE}")
    claim(out, {"minutes": minutes, "seed": seed, "steps": steps})
    page = out / "report.html"
    if page.exists():
        say(f"{page} is there already; remove {out} to run the demo again")
        return page
    started = time.monotonic()
    device = pick_device()
    tokenizer = load_tokenizer(TOKENIZER).to(device)
    for split, folder, views in (("train", "tokens", "center_flip"), ("validation", "tokens-validation", "center")):
        if not (out / folder).exists():
            say(f"OpenMoji, {split} images -> tokens")
            source = open_source("openmoji", split=split, image_size=tokenizer.image_size)
            write_token_store(out / folder, source, tokenizer, views=views)
    configs = {name: demo_config(name, out, steps=steps, seed=seed) for name in RUNS}
    updates = max(2, round(minutes * UPDATES_PER_MINUTE))
    for start in RUNS:
        for name in POST_TRAINING:
            configs[f"{start}-{name}"] = post_training_config(start, name, out, steps=updates, seed=seed)
    for name, config in configs.items():
        if not (out / name / "model").exists():
            say(f"training {name}: {config.loop.steps} steps")
            train(config, out / name, resume=(out / name / "config.json").exists())
    target = None
    for name in configs:
        if not (out / name / "results.json").exists():
            target = target or encode_reference(open_reference(TOKENIZER, tokenizer.image_size), tokenizer)
            evaluate_run(
                out / name,
                reference=TOKENIZER,
                target=target,
                reconstruct=name in RUNS,
                temperatures=TEMPERATURES,
                match=[out / f"{name}-vapi"] if name in RUNS else (),
                num_samples=NUM_SAMPLES,
                seed=seed,
                device=str(device),
                progress=say,
            )
    runs = [out / name for start in RUNS for name in (start, *(f"{start}-{post}" for post in POST_TRAINING))]
    write_report(runs, page, title="Plain AR, reAR and VA-pi on OpenMoji")
    say(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    return page


def claim(out: Path, settings: dict[str, float]) -> None:
    """Makes `out` this demo's folder, or checks that it is."""
    path = out / "demo.json"
    if path.exists():
        stored = read_json(path, "remove the folder or choose another --out")
        for key, value in settings.items():
            if stored.get(key) != value:
                raise UserError(
                    f"--{key}: {value:g}, but the demo in {out} was started with {stored.get(key)}; "
                    "remove it or choose another --out"
                )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} exists and holds no demo; choose another folder")
    text = json.dumps(settings, indent=1)
    write_atomically(path, lambda partial: partial.write_text(text + "\n"))
