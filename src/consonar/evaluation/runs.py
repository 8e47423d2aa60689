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

from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, model_folder, read_origin
from consonar.config_io import to_dict
from consonar.data.bad_images import BadImages
from consonar.data.transforms import to_uint8
from consonar.errors import UserError
from consonar.evaluation.entropy import Sharpness
from consonar.evaluation.evaluate import evaluate, prepare_reference
from consonar.evaluation.features import ImageSet, to_float
from consonar.evaluation.inputs import ReferenceSet, encode_reference, load_samples, open_reference
from consonar.evaluation.reconstruction import reconstruction_metrics
from consonar.evaluation.results import Evaluation, machine_name, origin_of_numbers
from consonar.evaluation.run_results import RECONSTRUCTION, RESULTS, is_measured, of_match, replacing, samples_name
from consonar.files.lock import holds_first_argument
from consonar.files.writers import file_sha256, write_atomically, write_json
from consonar.metrics.copying import CopyRate
from consonar.networks import load_feature_network
from consonar.networks.features import FeatureNetwork
from consonar.origin import Origin, check
from consonar.records import device_of, to_device
from consonar.sampling.job import balanced_labels, check_count, make_job, run_job, write_npz
from consonar.sampling.sample import SamplerConfig, check_batch_size
from consonar.types import Tokenizer

KEPT_IMAGES = 80
RECONSTRUCTIONS = 32
RESULTS_SCHEMA = 1
NUM_NEIGHBOURS = 3
"""k of improved precision and recall (Kynkäänniemi et al. 2019)."""


@holds_first_argument
def evaluate_run(
    run: Path,
    *,
    reference: str = "openmoji-64",
    feature_network: str = "efficientnet-lite0",
    temperatures: Sequence[float] = (1.0,),
    match: Sequence[Path] = (),
    target: ReferenceSet | None = None,
    reconstruct: bool = True,
    sampler: SamplerConfig | None = None,
    num_samples: int = 1024,
    seed: int = 0,
    draws: int = 4,
    batch_size: int = 64,
    device: str = "cpu",
    overwrite: bool = False,
    bad: BadImages | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Samples a finished run at every temperature, measures each against `reference`, and writes `run`/results.json.

    Every run in `match` adds a row at the temperature at which this one has that one's teacher-forced entropy (at
    temperature 1, on the validation images). `feature_network` is a name of `FEATURE_NETWORKS`; `target` the encoded
    reference where several runs share it; else it is opened here without `bad` images. Beside results.json:
    samples_tX.npz (some images of each row, with their nearest training images) and, of validation images and with
    `reconstruct`, reconstructions.npz and reconstruction.json. What was there stays until all is measured. Returns the
    content of results.json. Raises `UserError` for wrong settings, and when results exist, unless `overwrite`.
    """
    if (run / RESULTS).exists() and not overwrite:
        of = "" if is_measured(run) else " of weights that have changed since"
        raise UserError(f"{run / RESULTS} exists{of}; add --overwrite to measure again")
    check_count(num_samples, "num_samples", seed)
    check_batch_size(batch_size)
    if draws < 1 or num_samples // draws <= NUM_NEIGHBOURS:
        raise UserError(f"num_samples: {num_samples} in {draws} draws; each draw needs over {NUM_NEIGHBOURS} samples")
    at = [replace(sampler or SamplerConfig(), temperature=t) for t in temperatures]
    sha256 = file_sha256(model_folder(run) / "model.safetensors")
    generator, origin = load_generator(run).to(device), read_origin(run)
    tokenizer, network = load_own_tokenizer(run).to(device), load_feature_network(feature_network, device)
    sharpness = Sharpness(reference, tokenizer, batch_size, origin, bad)
    matched: dict[float, list[Path]] = {}
    for other in match:
        matched.setdefault(round(sharpness.match(generator, other), 4), []).append(other)
    samplers = list(dict.fromkeys([*at, *(replace(sampler or SamplerConfig(), temperature=t) for t in matched)]))
    target = target_of(run, origin, tokenizer, reference, target, batch_size=batch_size, bad=bad)
    # Before hours of sampling: what is wrong with the reference is found here, and its features are kept.
    prepare_reference(target, network, NUM_NEIGHBOURS, batch_size=batch_size, seed=seed)
    labels = balanced_labels(num_samples, generator.num_classes)
    entropies = sharpness.entropies(generator, [settings.temperature for settings in samplers])
    wanted = any(settings.temperature > 0 for settings in samplers)
    unavailable = {"entropy (teacher-forced)": sharpness.missing} if wanted and not entropies else {}
    if progress:
        progress(f"reference: {target.about}")
        for metric, reason in unavailable.items():
            progress(f"{metric}: not measured ({reason})")
    with replacing(run) as staged:
        rows = []
        for settings in samplers:
            if progress:
                progress(f"{run.name}: {num_samples} samples at temperature {settings.temperature:g}")
            job = make_job(generator, tokenizer, labels, seed=seed, sampler=settings, source=str(run), origin=origin)
            drawn = run / f".{samples_name(settings.temperature)}"
            drawn.unlink(missing_ok=True)
            run_job(job, generator, tokenizer, drawn, batch_size=batch_size, restart=True)
            results = evaluate(
                drawn, target, feature_network=network, num_neighbours=NUM_NEIGHBOURS, draws=draws, device=device,
                seed=seed, batch_size=batch_size,
            )  # fmt: skip
            kept = staged / samples_name(settings.temperature)
            keep_some(drawn, kept, target, results.copies, origin.class_names)
            row = result_row(settings, results, drawn) | {"samples": kept.name, "seed": seed}
            row["samples_sha256"] = file_sha256(kept)
            if settings.temperature in entropies:
                row["metrics"]["entropy (teacher-forced)"] = {"value": entropies[settings.temperature], "spread": None}
            rows += [row | of_match(other) for other in matched.get(settings.temperature, [])] or [row]
            drawn.unlink()
        content = {
            "schema": RESULTS_SCHEMA,
            "rows": rows,
            "best": best_row(rows),
            "checkpoint_sha256": sha256,
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
            "origin": to_dict(origin),
            "unavailable": unavailable,
            **origin_of_numbers(results, target.name),
            "draws": draws,
            "machine": machine_name(device),
        }
        if reconstruct and "validation" in target.images:
            measure_reconstruction(staged, tokenizer, target.images["validation"], network)
        write_json(staged / RESULTS, content)
    return content


def target_of(
    run: Path,
    origin: Origin,
    tokenizer: Tokenizer,
    reference: str,
    target: ReferenceSet | None,
    *,
    batch_size: int,
    bad: BadImages | None,
) -> ReferenceSet:
    """The reference in the tokens of the run's tokenizer: `target`, checked to be that, or opened and encoded here."""
    if target is None:
        return encode_reference(
            open_reference(reference, tokenizer.image_size, bad=bad), tokenizer, batch_size=batch_size
        )
    if target.name != reference or target.origin is None:
        raise UserError(f"target: {target.name} is not {reference} in the tokens of {tokenizer.name}; encode it anew")
    check("target", target.origin, origin, str(run), "encode it anew", parts=("tokenizer",))
    return target


def result_row(settings: SamplerConfig, results: Evaluation, drawn: Path) -> dict[str, Any]:
    """One row of results.json: the sampler's settings, the metrics, and the samples' mean entropy from their file."""
    with np.load(drawn) as arrays:
        entropy = float(arrays["entropy"].mean())
    metrics = {key: {"value": m.value, "spread": m.spread} for key, m in results.metrics.items()}
    return {
        **to_dict(settings),
        "num_samples": results.num_samples,
        "metrics": metrics | {"entropy": {"value": entropy, "spread": None}},
        "copies": {kind: {"threshold": copies.threshold} for kind, copies in results.copies.items()},
    }


def best_row(rows: list[dict[str, Any]]) -> int:
    """Index of the row with the lowest Fréchet distance, to the validation images where it was measured."""
    names = [key for key in rows[0]["metrics"] if key.startswith("FD(")]
    name = next((key for key in names if key.endswith(" validation")), names[0])
    return min(range(len(rows)), key=lambda i: rows[i]["metrics"][name]["value"])


def keep_some(
    drawn: Path,
    kept: Path,
    reference: ReferenceSet,
    copies: dict[str, CopyRate],
    class_names: tuple[str, ...] | None,
) -> None:
    """Some images of a sample file, with the nearest training image of each, into a small file for reports.

    The first ones, whose classes and seeds are the same for every run; of more classes than that, one of each of so
    many classes, evenly spaced.
    """
    samples = load_samples(drawn)
    assert samples.labels is not None and samples.seeds is not None
    num_classes = int(samples.labels.max()) + 1
    rows = torch.arange(min(KEPT_IMAGES, samples.count))
    if num_classes > KEPT_IMAGES:
        rows = torch.arange(KEPT_IMAGES) * min(num_classes, samples.count) // KEPT_IMAGES
        rows = rows.unique()
    arrays = {
        "images": pick(samples.images, rows),
        "labels": samples.labels[rows].numpy(),
        "seeds": samples.seeds[rows].numpy(),
        "settings": np.array(json.dumps(samples.settings)),
    }
    if (nearest := nearest_to(rows, copies)) is not None:
        arrays["nearest_train"] = pick(reference.images["train"], nearest)
    if class_names is not None:
        arrays["class_names"] = np.array(class_names)
    write_atomically(kept, lambda partial: write_npz(partial, arrays))


def nearest_to(rows: torch.Tensor, copies: dict[str, CopyRate]) -> torch.Tensor | None:
    """The training image nearest to each of these samples: by features, or by tokens where not all have features."""
    for kind in ("features", "tokens"):
        if kind in copies and bool(torch.isin(rows, copies[kind].rows).all()):
            return copies[kind].indices[torch.searchsorted(copies[kind].rows, rows)]
    return None


def pick(images: ImageSet, rows: torch.Tensor) -> np.ndarray:
    """The images at `rows` of a set that can only be walked through: (len(rows), H, W, 3) uint8."""
    wanted, start = set(rows.tolist()), 0
    found: dict[int, np.ndarray] = {}
    for batch in images.stream(256):
        found |= {start + i: batch[i] for i in range(len(batch)) if start + i in wanted}
        start += len(batch)
    return np.stack([found[row] for row in rows.tolist()])


@holds_first_argument
def evaluate_tokenizer(
    run: Path,
    *,
    reference: str,
    feature_network: str = "efficientnet-lite0",
    device: str = "cpu",
    overwrite: bool = False,
    bad: BadImages | None = None,
) -> dict[str, float]:
    """Measures the tokenizer of a run on the validation images of `reference` (on all, when it has one set).

    Writes reconstruction.json and reconstructions.npz into the run and returns the metrics. Raises `UserError` when
    they exist (unless `overwrite`).
    """
    if (run / RECONSTRUCTION).exists() and not overwrite:
        raise UserError(f"{run / RECONSTRUCTION} exists; add --overwrite to measure again")
    sha256 = file_sha256(model_folder(run) / "model.safetensors")
    tokenizer = load_tokenizer(model_folder(run)).to(device)
    images = open_reference(reference, tokenizer.image_size, bad=bad).images
    if not images:
        raise UserError(f"--reference: {reference} holds statistics, but a tokenizer is measured on images")
    measured = images.get("validation") or next(iter(images.values()))
    network = load_feature_network(feature_network, device)
    with replacing(run) as staged:
        return measure_reconstruction(staged, tokenizer, measured, network, checkpoint_sha256=sha256)


def measure_reconstruction(
    folder: Path, tokenizer: Tokenizer, images: ImageSet, network: FeatureNetwork, **origin: str
) -> dict[str, float]:
    """Writes reconstruction.json (all images of the set, and `origin`) and reconstructions.npz (some, evenly spaced).

    Returns the metrics.
    """
    metrics = reconstruction_metrics(
        tokenizer, (to_device(to_float(batch), device_of(tokenizer)) for batch in images.stream(64)),
        feature_network=network,
    )  # fmt: skip
    count = int(metrics["num_images"])
    rows = torch.linspace(0, count - 1, min(RECONSTRUCTIONS, count)).long()
    originals = pick(images, rows)
    with torch.inference_mode():
        pixels = to_device(to_float(originals), device_of(tokenizer))
        decoded = tokenizer.decode(tokenizer.encode(pixels)).clamp(-1, 1)
    arrays = {
        "originals": originals,
        "reconstructions": to_uint8(decoded).cpu().numpy(),
        "names": np.array([f"{images.name} {i}" for i in rows]),
    }
    write_atomically(folder / "reconstructions.npz", lambda partial: write_npz(partial, arrays))
    origin |= {"images": images.name, "tokenizer_fingerprint": tokenizer.fingerprint}
    origin |= {"feature_network_sha256": network.weights_sha256}
    write_json(folder / RECONSTRUCTION, {**metrics, "origin": origin})
    return metrics
