"""Frontiers, not points: one run measured over a grid of temperatures, into the run's own folder.

Regularisation changes how sharp a model is, and temperature alone moves the Fréchet distance a lot, so a run is a
curve. All rows of all runs share classes and seeds (common random numbers).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consonar import checkpoint
from consonar.errors import UserError
from consonar.evaluation.evaluate import (
    Reference,
    encode_reference,
    evaluate,
    load_samples,
    machine_name,
    open_reference,
)
from consonar.evaluation.features import ImageSet, load_feature_network, to_float
from consonar.evaluation.reconstruction import reconstruction_metrics
from consonar.generators import load_generator, model_folder, read_tokenizer_name
from consonar.sampling.job import balanced_labels, make_job, run_job, write_npz
from consonar.sampling.sample import SamplerConfig
from consonar.tokenizers import load_tokenizer
from consonar.types import Tokenizer

KEPT_IMAGES = 80
RECONSTRUCTIONS = 32
RESULTS_SCHEMA = 1


def evaluate_run(
    run: Path,
    *,
    reference: str = "openmoji-64",
    temperatures: Sequence[float] = (1.0,),
    sampler: SamplerConfig | None = None,
    num_samples: int = 1024,
    seed: int = 0,
    draws: int = 4,
    batch_size: int = 64,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Samples a finished run at every temperature, measures each against `reference`, and writes `run`/results.json.

    Beside it: samples_tX.npz (the first images of each row, with their nearest training images) and, when the reference
    has validation images, reconstructions.npz and reconstruction.json. Returns the content of results.json. Raises
    `UserError` when results exist (unless `overwrite`) or the run has no model.
    """
    path = run / "results.json"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; add --overwrite to measure again")
    generator = load_generator(run).to(device)
    tokenizer = load_tokenizer(read_tokenizer_name(run)).to(device)
    target = encode_reference(open_reference(reference, tokenizer.image_size), tokenizer, batch_size=batch_size)
    labels = balanced_labels(num_samples, generator.num_classes)
    rows = []
    for temperature in temperatures:
        if progress:
            progress(f"{run.name}: {num_samples} samples at temperature {temperature:g}")
        settings = replace(sampler or SamplerConfig(), temperature=temperature)
        job = make_job(generator, tokenizer, labels, seed=seed, sampler=settings, source=str(run))
        drawn = run / f".samples_t{temperature:g}.npz"
        drawn.unlink(missing_ok=True)
        run_job(job, generator, tokenizer, drawn, batch_size=batch_size)
        results = evaluate(drawn, target, draws=draws, device=device, seed=seed, batch_size=batch_size)
        kept = run / f"samples_t{temperature:g}.npz"
        nearest = results.copies["features"].indices[:KEPT_IMAGES] if "features" in results.copies else None
        keep_first(drawn, kept, target, nearest)
        with np.load(drawn) as arrays:
            entropy = arrays["entropy"]
        drawn.unlink()
        metrics = {key: {"value": m.value, "spread": m.spread} for key, m in results.metrics.items()}
        metrics["entropy"] = {"value": float(entropy.mean()), "spread": None}
        rows.append(
            {
                "temperature": temperature,
                "guidance_scale": settings.guidance_scale,
                "guidance_schedule": settings.guidance_schedule,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
                "num_samples": num_samples,
                "seed": seed,
                "metrics": metrics,
                "samples": kept.name,
                "copies": {k: {"threshold": c.threshold} for k, c in results.copies.items()},
            }
        )
    content = {
        "schema": RESULTS_SCHEMA,
        "rows": rows,
        "best": best_row(rows),
        "feature_network": results.feature_network,
        "checkpoint_sha256": checkpoint.file_sha256(model_folder(run) / "model.safetensors"),
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "reference": {"name": target.name, **{f"num_{k}": v for k, v in results.num_reference.items()}},
        "noise_floor": {key: {"value": value} for key, value in results.noise_floor.items()},
        "draws": draws,
        "versions": results.versions,
        "machine": machine_name(device),
    }
    if "validation" in target.images:
        measure_reconstruction(run, tokenizer, target.images["validation"], device)
    text = json.dumps(content, indent=1)
    checkpoint.write_atomically(path, lambda partial: partial.write_text(text + "\n"))
    return content


def best_row(rows: list[dict[str, Any]]) -> int:
    """Index of the row with the lowest Fréchet distance, to the validation images where it was measured."""
    names = [key for key in rows[0]["metrics"] if key.startswith("FD(")]
    name = next((key for key in names if key.endswith(" validation")), names[0])
    return min(range(len(rows)), key=lambda i: rows[i]["metrics"][name]["value"])


def keep_first(drawn: Path, kept: Path, reference: Reference, nearest: torch.Tensor | None) -> None:
    """The first images of a sample file, with the nearest training image of each, into a small file for reports."""
    samples = load_samples(drawn)
    images = next(samples.images.stream(KEPT_IMAGES))
    assert samples.labels is not None and samples.seeds is not None
    arrays = {
        "images": images,
        "labels": samples.labels[: len(images)].numpy(),
        "seeds": samples.seeds[: len(images)].numpy(),
        "settings": np.array(json.dumps(samples.settings)),
    }
    if nearest is not None:
        arrays["nearest_train"] = pick(reference.images["train"], nearest)
    if reference.name.startswith("openmoji"):
        from consonar.data.openmoji import CLASS_NAMES

        arrays["class_names"] = np.array(CLASS_NAMES)
    checkpoint.write_atomically(kept, lambda partial: write_npz(partial, arrays))


def pick(images: ImageSet, rows: torch.Tensor) -> np.ndarray:
    """The images at `rows` of a set that can only be walked through: (len(rows), H, W, 3) uint8."""
    wanted, start = set(rows.tolist()), 0
    found: dict[int, np.ndarray] = {}
    for batch in images.stream(256):
        found |= {start + i: batch[i] for i in range(len(batch)) if start + i in wanted}
        start += len(batch)
    return np.stack([found[row] for row in rows.tolist()])


def measure_reconstruction(run: Path, tokenizer: Tokenizer, images: ImageSet, device: str) -> None:
    """Writes reconstruction.json (all validation images) and reconstructions.npz (some, evenly spaced)."""
    metrics = reconstruction_metrics(
        tokenizer, (to_float(batch).to(device) for batch in images.stream(64)),
        feature_network=load_feature_network("efficientnet-lite0", device),
    )  # fmt: skip
    count = int(metrics["num_images"])
    rows = torch.linspace(0, count - 1, min(RECONSTRUCTIONS, count)).long()
    originals = pick(images, rows)
    with torch.inference_mode():
        decoded = tokenizer.decode(tokenizer.encode(to_float(originals).to(device))).clamp(-1, 1).cpu()
    pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    arrays = {
        "originals": originals,
        "reconstructions": pixels,
        "names": np.array([f"validation image {i}" for i in rows]),
    }
    checkpoint.write_atomically(run / "reconstructions.npz", lambda partial: write_npz(partial, arrays))
    text = json.dumps(metrics, indent=1)
    checkpoint.write_atomically(run / "reconstruction.json", lambda partial: partial.write_text(text + "\n"))
