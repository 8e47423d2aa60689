"""Samples against a reference: Fréchet distances, precision, recall, copy rates, and the file that records them.

The formulas and their papers are in `statistics.py` and `copying.py`. Deviations from the ADM protocol: another feature
network by default (so the metric has another name), and an uncertainty: with `draws` > 1 the samples are split at
random into that many disjoint equal parts, and the standard deviation of a metric over the parts is its `spread`. A
Fréchet distance is biased upwards for few samples, so the value of a part is larger than that of all samples: parts
compare among themselves only, and their values are not reported.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consonar import __version__
from consonar.errors import UserError
from consonar.evaluation import features as sets
from consonar.evaluation.copying import CopyRate, copy_rate_features, copy_rate_tokens
from consonar.evaluation.features import FeatureNetwork, FeatureSet, ImageSet, load_feature_network
from consonar.evaluation.statistics import Moments, Target, random_parts
from consonar.sampling.sample import check_batch_size
from consonar.seeding import generator
from consonar.types import Tokenizer

REFERENCES = {"openmoji-64": ("openmoji", 64)}
"""References by the name of a shipped tokenizer: the data it was made for, and the size in pixels."""


@dataclass(frozen=True)
class Samples:
    """Generated images of one size, streamed, with what was stored beside them."""

    images: ImageSet
    count: int
    image_size: int
    sha256: str
    """Of the file, or of the names and bytes of a folder's files."""
    labels: Tensor | None = None
    tokens: Tensor | None = None
    seeds: Tensor | None = None
    """Labels (S,), tokens (S, N) and seeds (S,) are int64."""
    settings: dict[str, Any] | None = None
    """The sampler's settings."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: image sets called `train` and `validation`, or one called `reference`."""

    name: str
    images: dict[str, ImageSet]
    statistics: tuple[Tensor, Tensor] | None = None
    """Mean (F,) and covariance (F, F) instead of images; then only the Fréchet distance exists."""
    tokens: dict[str, Tensor] | None = None
    """Tokens (T, N) or (T, views, N) of the same images by the same names; see `encode_reference`."""


@dataclass(frozen=True)
class Metric:
    """A value over all samples, and its standard deviation over `draws` disjoint parts (None for one draw)."""

    value: float
    spread: float | None


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    python, numpy = platform.python_version(), np.__version__
    return {"python": python, "torch": torch.__version__, "numpy": numpy, "consonar": __version__}


def machine_name(device: str) -> str:
    """The accelerator's name, or the processor's for `cpu`."""
    if torch.device(device).type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    table = Path("/proc/cpuinfo")  # Linux only; elsewhere Python knows as much as there is
    found = re.search(r"^model name\s*: (.*)$", table.read_text() if table.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Results:
    """Everything that makes a metric a result. `to_json` writes all of it but the per-sample part of `copies`."""

    metrics: dict[str, Metric]
    unavailable: dict[str, str]
    """Metrics that this reference or these samples do not allow, and why."""
    noise_floor: dict[str, float]
    """Fréchet distance of validation to training images: what real images reach."""
    copies: dict[str, CopyRate]
    """`tokens` and `features`: threshold, and nearest training image of every sample."""
    num_samples: int
    num_reference: dict[str, int]
    """Images per set of the reference; none for statistics."""
    samples: dict[str, Any]
    """Name and SHA-256 of the file, and the sampler's settings when it holds them."""
    reference: str
    feature_network: dict[str, str]
    seed: int
    config: dict[str, Any]
    machine: str
    versions: dict[str, str] = field(default_factory=library_versions)
    timestamp: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = 1

    def to_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the results. Raises UserError when the file exists (unless `overwrite`) or cannot be written."""
        path = Path(path)
        if path.exists() and not overwrite:
            raise UserError(f"results: {path} exists; give another path, or ask to overwrite it")
        content = asdict(replace(self, copies={}))
        content["copies"] = {k: {"threshold": c.threshold, "quantile": c.quantile} for k, c in self.copies.items()}
        with sets.atomic_file(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())


def load_samples(path: str | Path) -> Samples:
    """Samples from an .npz or a folder of PNG and JPEG files; the images are streamed later, not read now.

    .npz: uint8 images (S, H, H, 3) as `images` or `arr_0` (ADM); optional `labels` or `arr_1` (S,), `tokens` (S, N),
    `seeds` (S,), and the sampler's `settings` as a JSON string. Raises UserError for a missing or damaged file, arrays
    of other shapes, or images that are not square.
    """
    path = Path(path)
    if path.is_dir():
        images, shape, sha256 = sets.folder_image_set(path)
        return Samples(images, shape[0], _square(path, shape), sha256)
    images, shape = sets.npz_image_set(path)
    extra: dict[str, Any] = {}
    with np.load(path) as arrays:
        for key, name in (("labels", "labels"), ("arr_1", "labels"), ("tokens", "tokens"), ("seeds", "seeds")):
            if key in arrays:
                array, ndim = arrays[key], 2 if key == "tokens" else 1
                if array.dtype.kind not in "iu" or array.ndim != ndim or len(array) != shape[0]:
                    expected = f"expected {ndim}-d integers for {shape[0]} images"
                    raise UserError(f"{path}: {key} is {array.dtype} {array.shape}; {expected}")
                extra[name] = torch.from_numpy(array.astype(np.int64))
        if "settings" in arrays:
            extra["settings"] = json.loads(str(arrays["settings"]))
    return Samples(images, shape[0], _square(path, shape), sets.file_sha256(path), **extra)


def open_reference(spec: str | Path, image_size: int, *, splits: tuple[str, ...] | None = None) -> Reference:
    """The reference called `spec`, for samples of `image_size` px.

    A name in `REFERENCES`; an .npz of images (as for `load_samples`) or of statistics (`mu` (F,), `sigma` (F, F));
    otherwise what `consonar.data.images.open_source` takes, centre-cropped to `image_size`. `splits` of such a source:
    by default train and validation for `openmoji` and a folder with both sub-folders, else its images as one set.
    Raises UserError for an unknown spec or another image size.
    """
    spec = str(spec)
    if spec in REFERENCES:
        source, size = REFERENCES[spec]
        if size != image_size:
            raise UserError(f"reference {spec} has {size} px, but the samples have {image_size} px; use {source!r}")
        return replace(open_reference(source, size), name=spec)
    if spec.endswith(".npz"):
        path = Path(spec)
        if {"mu", "sigma"} <= set(sets.npz_keys(path)):
            with np.load(path) as arrays:
                return Reference(spec, {}, (torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])))
        images, shape = sets.npz_image_set(path)
        if _square(path, shape) != image_size:
            raise UserError(f"reference {spec}: images of {shape[1]} px, but the samples have {image_size} px")
        return Reference(spec, {"reference": images})
    from consonar.data.images import SPLIT_NAMES, open_source

    folder = Path(spec.removeprefix("imagefolder:")).expanduser()
    both = all(any((folder / name).is_dir() for name in SPLIT_NAMES[split]) for split in ("train", "validation"))
    chosen = splits or (("train", "validation") if both or spec == "openmoji" else None)
    opened = {
        name: sets.source_image_set(open_source(spec, split=name, image_size=image_size), image_size)
        for name in chosen or ("train",)
    }
    return Reference(spec, opened if chosen else {"reference": opened["train"]})


def encode_reference(reference: Reference, tokenizer: Tokenizer, *, batch_size: int = 64) -> Reference:
    """The reference with the tokens of its images, for the copy rate in tokens; the tokenizer must be the samples'."""
    tokens = {
        name: torch.cat([tokenizer.encode(sets.to_float(batch)).cpu() for batch in images.stream(batch_size)])
        for name, images in reference.images.items()
    }
    return replace(reference, tokens=tokens)


def evaluate(
    samples: Samples | str | Path,
    reference: Reference | str | Path,
    *,
    feature_network: str | FeatureNetwork = "efficientnet-lite0",
    num_neighbours: int = 3,
    max_neighbours_images: int = 10_000,
    copy_quantile: float = 0.0,
    batch_size: int = 64,
    device: str = "cpu",
    draws: int = 1,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Results:
    """Measure `samples` against `reference`; what each metric means is in docs/evaluation.md.

    `FD(NETWORK) train` and `FD(NETWORK) validation` (`FD(NETWORK)` for a reference of one set), `precision` and
    `recall` against the training set with k = `num_neighbours`, `copy rate (features)` and `copy rate (tokens)` at the
    threshold of `copy_quantile`. Means and covariances run over all images; precision, recall and the feature copy rate
    over the first `max_neighbours_images` of each set, as in ADM, so shuffle a larger set that is ordered by class.
    `draws` > 1 adds the spread over disjoint parts, drawn with `seed`. A network given by name runs on `device`.
    `progress` gets a set's name and the number of images done. Raises UserError for wrong input or too few samples.
    """
    samples = samples if isinstance(samples, Samples) else load_samples(samples)
    reference = reference if isinstance(reference, Reference) else open_reference(reference, samples.image_size)
    network = load_feature_network(feature_network, device) if isinstance(feature_network, str) else feature_network
    part_of = random_parts(samples.count, draws, generator(seed, "evaluation", "parts"))  # (S,)
    if samples.count // draws <= (least := max(num_neighbours, 1)):
        raise UserError(f"{samples.images.name}: {samples.count} images; each of {draws} draws needs over {least}")
    check_batch_size(batch_size)
    if not 0 <= copy_quantile <= 1:
        raise UserError(f"copy_quantile: {copy_quantile}; choose a number from 0 (the minimum) to 1")
    keep: Any = {"batch_size": batch_size, "max_rows": max_neighbours_images, "progress": progress}
    known = {name: sets.cached_features(network, images, **keep) for name, images in reference.images.items()}
    target = _prepare(network, reference, known, num_neighbours)
    found = sets.extract_features(network, samples.images, part_of=part_of if draws > 1 else None, **keep)
    copies, unavailable = _copy_rates(samples, found, reference, known, copy_quantile)
    values = _measure(target, network.name, found.moments, found.rows, copies, part_of >= -1)
    parts = [_measure(target, network.name, p, found.rows, copies, part_of == i) for i, p in enumerate(found.parts)]
    limits = {"num_neighbours": num_neighbours, "max_neighbours_images": max_neighbours_images}
    config = {**limits, "copy_quantile": copy_quantile, "batch_size": batch_size, "device": device, "draws": draws}
    return Results(
        metrics={k: Metric(value, stdev(part[k] for part in parts) if parts else None) for k, value in values.items()},
        unavailable=unavailable,
        noise_floor={f"FD({network.name}) {name}": value for name, value in target.noise_floor().items()},
        copies=copies,
        num_samples=samples.count,
        num_reference={name: features.moments.count for name, features in known.items()},
        samples={"name": samples.images.name, "sha256": samples.sha256, "settings": samples.settings},
        reference=reference.name,
        feature_network={"name": network.name, "sha256": network.weights_sha256},
        seed=seed,
        config=config,
        machine=machine_name(device),
    )


def _prepare(network: FeatureNetwork, reference: Reference, known: dict[str, FeatureSet], k: int) -> Target:
    gaussians = {name: (features.moments.mean, features.moments.cov) for name, features in known.items()}
    if reference.statistics:
        gaussians["reference"] = reference.statistics
        width = len(reference.statistics[0])
        if width != network.num_features:
            raise UserError(f"reference {reference.name}: {width} features, {network.name} has {network.num_features}")
    near = known.get("train") or known.get("reference")
    return Target(gaussians, near.rows if near else None, k)


def _measure(
    target: Target, network: str, moments: Moments, rows: Tensor, copies: dict[str, CopyRate], members: Tensor
) -> dict[str, float]:
    """Metrics of a part of the samples: its moments, and (S,) bool which of all `rows` and `copies` are in it."""
    distances = target.frechet_distances(moments)
    values = {f"FD({network}) {name}".removesuffix(" reference"): value for name, value in distances.items()}
    values |= target.precision_recall(rows[members[: len(rows)]])
    for kind, found in copies.items():
        values[f"copy rate ({kind})"] = float(found.is_copy[members[: len(found.is_copy)]].double().mean())
    return values


def _copy_rates(
    samples: Samples, found: FeatureSet, reference: Reference, known: dict[str, FeatureSet], quantile: float
) -> tuple[dict[str, CopyRate], dict[str, str]]:
    """The copy rates that can be measured, and why other metrics cannot."""
    without_images = "the reference holds statistics, no images"
    why = dict.fromkeys(("precision", "recall"), without_images) if reference.statistics else {}
    if not {"train", "validation"} <= known.keys():
        reason = "the reference has no train and validation images"
        return {}, why | dict.fromkeys(("copy rate (features)", "copy rate (tokens)"), reason)
    train, validation = known["train"].rows, known["validation"].rows
    copies = {"features": copy_rate_features(found.rows, train, validation, quantile=quantile)}
    if samples.tokens is None or reference.tokens is None:
        missing = "samples carry" if samples.tokens is None else "reference carries"
        return copies, why | {"copy rate (tokens)": f"the {missing} no tokens"}
    tokens = reference.tokens["train"], reference.tokens["validation"]
    return copies | {"tokens": copy_rate_tokens(samples.tokens, *tokens, quantile=quantile)}, why


def _square(path: Path, shape: tuple[int, ...]) -> int:
    if shape[1] != shape[2]:
        raise UserError(f"{path}: images of {shape[2]} x {shape[1]} px; only square images can be evaluated")
    return shape[1]
