"""Samples against a reference: Fréchet distances, precision, recall, Inception score and copy rates.

The formulas and their papers are in `statistics.py` and `copying.py`, the file that records them in `results.py`. The
ADM protocol is `feature_network="inception"` (see `inception.py`). Deviations from it: another feature network by
default (so the metric has another name), and an uncertainty: with `draws` > 1 the samples are split at
random into that many disjoint equal parts, and the standard deviation of a metric over the parts is its `spread`. A
Fréchet distance is biased upwards for few samples, so the value of a part is larger than that of all samples: parts
compare among themselves only, and their values are not reported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from consonar.errors import UserError
from consonar.evaluation import features as sets
from consonar.evaluation.features import FeatureSet
from consonar.evaluation.inputs import ReferenceSet, SampleSet, check_tokenizer, load_samples, open_reference
from consonar.evaluation.measure import copy_rates, measure, prepare, remarks
from consonar.evaluation.results import Evaluation, Metric, library_versions, machine_name
from consonar.metrics.distribution import Target, random_parts
from consonar.networks import load_feature_network
from consonar.networks.features import FeatureNetwork
from consonar.origin import Origin
from consonar.sampling.sample import check_batch_size
from consonar.seeding import check_seed, generator

MAX_ROWS = 10_000
"""Images of a set that are compared with each other."""


def prepare_reference(
    reference: ReferenceSet, network: FeatureNetwork, num_neighbours: int, *, max_rows: int = MAX_ROWS, **options: Any
) -> tuple[dict[str, FeatureSet], dict[str, Target], dict[str, str]]:
    """Features of each set of the reference (`cached_features`), then what `prepare` makes of them."""
    images = reference.images.items()
    known = {name: sets.cached_features(network, one, max_rows=max_rows, **options) for name, one in images}
    return known, *prepare(network, reference, known, num_neighbours)


def evaluate(
    samples: SampleSet | str | Path,
    reference: ReferenceSet | str | Path,
    *,
    feature_network: str | FeatureNetwork = "efficientnet-lite0",
    num_neighbours: int = 3,
    max_neighbours_images: int = MAX_ROWS,
    copy_quantile: float = 0.0,
    batch_size: int = 64,
    device: str = "cpu",
    draws: int = 1,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Measure `samples` against `reference`; what each metric means is in docs/evaluation.md.

    `FD(NETWORK) train` and `FD(NETWORK) validation` (`FD(NETWORK)` for a reference of one set), `precision` and
    `recall` against the training set with k = `num_neighbours`, `copy rate (features)` and `copy rate (tokens)` at the
    threshold of `copy_quantile`; of a `ScoringNetwork` also `sFD(NETWORK)` and `IS(NETWORK)`. Means and covariances run
    over all images; precision, recall and the feature copy rate over `max_neighbours_images` of each set, drawn by
    `seed` and the pixels, so that the order of a set changes nothing. `draws` > 1 adds the spread over disjoint parts,
    drawn with `seed`. A network given by name runs on `device`.
    `progress` gets a set's name and the number of images done. Raises UserError for wrong input or too few samples.
    """
    check_seed(seed, "seed")
    check_batch_size(batch_size)
    samples = samples if isinstance(samples, SampleSet) else load_samples(samples)
    if draws > 0 and samples.count // draws <= (least := max(num_neighbours, 1)):
        raise UserError(f"{samples.images.name}: {samples.count} images; each of {draws} draws needs over {least}")
    part_of = random_parts(samples.count, draws, generator(seed, "evaluation", "parts"))  # (S,)
    reference = reference if isinstance(reference, ReferenceSet) else open_reference(reference, samples.image_size)
    if samples.tokens is not None:
        check_tokenizer(samples, reference.origin or Origin())
    network = load_feature_network(feature_network, device) if isinstance(feature_network, str) else feature_network
    if not 0 <= copy_quantile <= 1:
        raise UserError(f"copy_quantile: {copy_quantile}; choose a number from 0 (the minimum) to 1")
    if max_neighbours_images <= least:
        raise UserError(f"max_neighbours_images: {max_neighbours_images}; {num_neighbours} neighbours need more")
    keep: Any = {"batch_size": batch_size, "max_rows": max_neighbours_images, "seed": seed, "progress": progress}
    known, targets, without = prepare_reference(reference, network, num_neighbours, **keep)
    found = sets.extract_features(
        network, samples.images, part_of=part_of if draws > 1 else torch.full_like(part_of, -1), **keep
    )
    copies, unavailable = copy_rates(samples, found, reference, known, copy_quantile)
    values = measure(targets, network.name, found, 0, copies, part_of >= -1)
    num_parts = len(found.parts)
    parts = [measure(targets, network.name, found, 1 + i, copies, part_of == i) for i in range(num_parts)]
    limits = {"num_neighbours": num_neighbours, "max_neighbours_images": max_neighbours_images}
    config = {**limits, "copy_quantile": copy_quantile, "batch_size": batch_size, "device": device, "draws": draws}
    return Evaluation(
        metrics={k: Metric(value, stdev(part[k] for part in parts) if parts else None) for k, value in values.items()},
        unavailable=without | unavailable,
        remarks=remarks(network, targets, found, known, seed, copies),
        noise_floor={
            f"{kind}({network.name}) {name}": value
            for kind, target in targets.items()
            for name, value in target.noise_floor().items()
        },
        copies=copies,
        num_samples=samples.count,
        num_reference={name: features.moments.count for name, features in known.items()},
        reference_sha256={name: features.content for name, features in known.items()} | reference.statistics_sha256,
        samples={"name": samples.images.name, "sha256": samples.sha256, "settings": samples.settings},
        reference=reference.name,
        feature_network={"name": network.name, "sha256": network.weights_sha256},
        seed=seed,
        config=config,
        machine=machine_name(device),
        versions=library_versions(),
    )
