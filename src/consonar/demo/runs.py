"""The runs of the demo: same seed, data order, steps and samples for those of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from consonar.demo.plan import Part, Work
from consonar.recipes.openmoji import ar_openmoji, ce_openmoji, rear_openmoji, vapi_spatial_openmoji
from consonar.training.config import TrainConfig

TEMPERATURES = (1.0, 0.7)
RUNS = {"plain-ar": ar_openmoji, "rear": rear_openmoji}
POST_TRAINING = {"ce": ce_openmoji, "vapi": vapi_spatial_openmoji}
# A run that others start from has one row more, at the temperature of equal entropy.
PARTS = {name: Part(name, "step", len(TEMPERATURES) + 1) for name in RUNS} | {
    f"{start}-{name}": Part(name, "update", len(TEMPERATURES)) for start in RUNS for name in POST_TRAINING
}


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


def config_of(name: str, out: Path, work: Work, seed: int) -> TrainConfig:
    """The configuration of one of `PARTS`."""
    if PARTS[name].unit == "step":
        return demo_config(name, out, steps=work.steps, seed=seed)
    return post_training_config(
        name.removesuffix(f"-{PARTS[name].kind}"), PARTS[name].kind, out, steps=work.updates, seed=seed
    )
