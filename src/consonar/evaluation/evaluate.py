"""Samples against a reference by the metrics of `SAMPLE_METRICS`.

The formulas and their papers are in `consonar.metrics`. Deviations from the ADM protocol: another feature network by
default (`feature_network="inception"` is ADM's), and an uncertainty: with `draws` > 1 the samples are split at random
into that many disjoint equal parts, and the standard deviation of a metric over the parts is its `spread`. A Fréchet
distance is biased upwards for few samples, so parts compare among themselves only, and their values are not reported.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from consonar.components import load_tokenizer
from consonar.data.bad_images import BadImages, bad_images_record
from consonar.data.store_format import check_tokens
from consonar.distributed import ALONE, World, machine_name
from consonar.errors import UserError
from consonar.evaluation.features import FeatureSet, ImagesDone, drawn_places, extract_features
from consonar.evaluation.inputs import (
    ReferenceSet,
    SampleSet,
    check_tokenizer,
    in_tokens,
    load_samples,
    open_reference,
)
from consonar.evaluation.reference import PreparedReference
from consonar.evaluation.results import Evaluation, library_versions
from consonar.evaluation.sample_metrics import check_metrics, copy_rates, measure
from consonar.evaluation.settings import ENOUGH, EvaluationSettings
from consonar.metrics import protocol_line
from consonar.metrics.copying import CopyRate
from consonar.metrics.distribution import Target, random_parts
from consonar.metrics.frechet import distance_of_draws
from consonar.metrics.shares import class_shift
from consonar.model_folders import SHIPPED
from consonar.networks import FeatureNetwork, load_feature_network, record_of
from consonar.origin import Origin, same_text
from consonar.seeding import derive_seed

ALIKE = 1e-10
"""Share of the squared mean that the variance of features has by the rounding of equal ones, and less."""


def evaluate(
    samples: SampleSet | str | Path,
    reference: ReferenceSet | str | Path,
    settings: EvaluationSettings | None = None,
    *,
    feature_network: str | FeatureNetwork = "efficientnet-lite0",
    progress: ImagesDone | None = None,
    world: World = ALONE,
    **options: Any,  # of the types of the fields, which are checked when they are set
) -> Evaluation:
    """Measure `samples` against `reference` by the metrics of `SAMPLE_METRICS`; docs/evaluation.md says what they mean.

    Means and covariances run over all images; what compares single ones over `max_neighbours_images` of each set. They,
    the parts and the splits are drawn by `seed` and the pixels, so that the order of a set changes nothing. `options`
    are fields of the settings by name. `progress` gets a set's name, the number of images done, and of all. The
    processes of `world` call it alike, share the work of the network, and get the same. Raises UserError for
    wrong input or too few samples.
    """
    settings = replace(settings or EvaluationSettings(), **options)
    check_metrics(settings)
    samples = samples if isinstance(samples, SampleSet) else load_samples(samples)
    settings.check_parts(samples.count, samples.images.name)
    if not isinstance(reference, ReferenceSet):
        reference = open_reference(reference, samples.image_size, validation_split=settings.validation_split)
    if samples.tokens is not None:
        check_tokenizer(samples, reference.origin or Origin())
    network = load_feature_network(feature_network, settings.device)
    with settings.multiplying():
        classes = (samples.labels, samples.class_names)
        prepared = PreparedReference(reference, network, settings, progress, world, classes)
        return compare(samples, prepared, settings, progress, world)


def compare(
    samples: SampleSet,
    reference: PreparedReference,
    settings: EvaluationSettings,
    progress: ImagesDone | None = None,
    world: World = ALONE,
) -> Evaluation:
    """`evaluate` of samples that were checked, against a reference that was prepared with the same settings."""
    network, seed = reference.network, settings.seed
    if samples.labels is not None and not (samples.labels >= 0).any():
        samples = replace(samples, labels=None)
    reference.check_labels(samples.labels, samples.class_names)
    places, _ = drawn_places(samples.images, settings)  # (S,)
    part_of = random_parts(places, settings.draws)
    found = extract_features(
        network, samples.images, settings, places, max_rows=settings.kept_samples,
        part_of=part_of if settings.draws > 1 else torch.full_like(part_of, -1), progress=progress,
        world=world,
    )  # fmt: skip
    rates = copy_rates(samples, found, reference, settings)
    copies = {kind: copied for kind, copied in rates.items() if isinstance(copied, CopyRate)}
    (values, unavailable), *parts = measure(samples, found, reference, rates, part_of)
    spreads = {
        name: stdev(part[name].value for part, _ in parts)
        for name in values
        if parts and all(name in part for part, _ in parts)
    }
    sets, used = reference.features.items(), reference.given.origin
    return Evaluation(
        metrics={name: replace(value, spread=spreads.get(name)) for name, value in values.items()},
        unavailable=unavailable,
        remarks=(*remarks(found, reference, copies, samples.labels), *remarks_on_sets(samples, reference)),
        noise_floor=reference.noise_floor,
        copies=copies,
        num_samples=samples.count,
        num_reference={name: features.moments.count for name, features in sets},
        reference_sha256={name: features.content for name, features in sets} | reference.given.statistics_sha256,
        samples={"name": samples.images.name, "sha256": samples.sha256, "settings": samples.settings},
        reference=reference.given.name,
        feature_network=record_of(network),
        protocol=protocol(found, reference),
        tokenizer={"name": used.tokenizer, "fingerprint": used.tokenizer_fingerprint} if used else {},
        seed=seed,
        bad_images=bad_images_record(samples.bad, reference.given.bad),
        config={one.name: getattr(settings, one.name) for one in fields(EvaluationSettings) if one.name != "seed"},
        machine=machine_name(settings.device),
        versions=library_versions(),
    )


def protocol(found: FeatureSet, reference: PreparedReference) -> str:
    """What the numbers are of: how many samples, whose features, against what of the reference."""
    given, most = reference.given, reference.settings.max_neighbours_images
    counts = {name: features.moments.count for name, features in reference.features.items()}
    own = ("statistics of the file for FD and sFD",) if given.statistics else ()
    some = f"; single images of {most:,} drawn" if max([found.moments.count, *counts.values()]) > most else ""
    return protocol_line(f"{found.moments.count:,} samples", reference.network.name, given.name, counts, *own) + some


def open_target(
    samples: SampleSet,
    spec: str,
    tokenizer: str | None,
    settings: EvaluationSettings,
    bad: BadImages | None = None,
    world: World = ALONE,
) -> ReferenceSet:
    """The reference `spec` for samples; where these have tokens, in those of `tokenizer` (`in_tokens`).

    None: in those of the tokenizer that the samples name, when that is a shipped one. Raises `UserError` for a
    tokenizer of samples without tokens, one that did not make them, and as `open_reference` does.
    """
    where = samples.images.name
    if tokenizer is not None and samples.tokens is None:
        raise UserError(f"--tokenizer: {tokenizer!r} is read only for samples with tokens, and {where} has none")
    target = open_reference(spec, samples.image_size, validation_split=settings.validation_split, bad=bad)
    made = samples.settings or {}
    name = tokenizer or (named if (named := made.get("tokenizer")) in SHIPPED["tokenizer"] else None)
    if name is None or samples.tokens is None:
        return target
    codec = load_tokenizer(name).to(settings.device)
    if tokenizer is None and made.get("tokenizer_fingerprint") not in (None, codec.fingerprint):
        return target  # another of that name made them
    check_tokenizer(samples, Origin(tokenizer=name, tokenizer_fingerprint=codec.fingerprint))
    check_tokens(samples.tokens.numpy(), codec.vocab_size, codec.name, where)
    return in_tokens(target, codec, settings, world)


def remarks(
    found: FeatureSet, reference: PreparedReference, copies: dict[str, CopyRate], labels: Tensor | None
) -> Iterator[str]:
    """What must be known to read the numbers, one line each: samples that are one picture, the bias of few images, also
    within a class (`labels` (S,) are those of the samples), and copies that are not seen."""
    network, known, count = reference.network, reference.features, found.moments.count
    if found.moments.cov.trace() <= ALIKE * found.moments.mean.square().sum():
        yield f"samples: all {count:,} are one picture to {network.name}"
    for kind, target in (("FD", reference.target), ("sFD", reference.spatial)):
        if target is not None and target.gaussians:
            yield from remarks_on_few(f"{kind}({network.name})", target, count, reference)
    if reference.settings.wants("fd-per-class") and labels is not None and reference.labels:
        smallest = min(
            int(of[of >= 0].unique(return_counts=True)[1].min()) for of in (labels, *reference.labels.values())
        )
        if smallest < ENOUGH * network.num_features:
            yield (
                f"FD per class({network.name}) is biased upwards: the smallest class has {smallest:,} images "
                f"({network.num_features:,} features); compare it at equal numbers of samples and equal references only"
            )
    train = known.get("train")
    most = reference.settings.max_neighbours_images
    if "features" in copies and train is not None and most < train.moments.count:
        yield (
            f"copy rate (features) looks at {most:,} of {train.moments.count:,} training images: copies of "
            "the others are not seen (max_neighbours_images says how many)"
        )
    for kind, copied in copies.items():
        if copied.threshold == 0:
            yield (
                f"copy rate ({kind}) cannot see a copy: a validation image is equal to a training image; keep it in "
                "one of the sets, or read the rate at another copy_quantile"
            )
    k = reference.settings.density_neighbours
    radii = reference.radii.get(k) if reference.settings.wants("density", "coverage") else None
    if radii is not None and (empty := int((radii == 0).sum())):
        yield (
            f"density and coverage: {empty:,} of {len(radii):,} pictures of the reference are there more than {k} "
            "times, and their balls hold nothing: not even the reference itself scores 1"
        )
    if found.scores and count < ENOUGH * (num_classes := found.scores.num_classes):
        yield f"IS({network.name}) is biased downwards: {count:,} samples for {num_classes:,} classes"
    if found.scores and len(sizes := found.scores.sizes) > 1 and min(sizes) < max(sizes):
        few = f"its last part has {min(sizes):,} samples, is biased downwards, and counts as one of {max(sizes):,}"
        yield f"IS({network.name}): {few} does, as in ADM's code; draw a multiple of {max(sizes):,}"


def remarks_on_few(name: str, target: Target, count: int, reference: PreparedReference) -> Iterator[str]:
    """The bias of a Fréchet distance to `target` by few samples, `count`, and by few images of the reference: the same
    line for all samples, whatever the seed."""
    of, (mean, _, root) = next(iter(target.gaussians.items()))
    few, of_features = ENOUGH * len(mean), f"{len(mean):,} features"
    if count < few:
        perfect = distance_of_draws(root, count, derive_seed(0, "draws"))
        yield (
            f"{name} is biased upwards by few samples: {count:,} draws from the Gaussian of the {of} set itself "
            f"({of_features}) score {perfect:.3g}; compare it at equal numbers of samples only"
        )
    sizes = {which: features.moments.count for which, features in reference.features.items()}
    small = [f"{which} {size:,}" for which, size in sizes.items() if size < few]
    if small and reference.given.statistics is None:  # else how few images there are does not matter
        yield (
            f"{name} is biased upwards by few images of the reference, too ({', '.join(small)}, {of_features}); "
            "compare it at equal references only"
        )


def remarks_on_sets(samples: SampleSet, reference: PreparedReference) -> Iterator[str]:
    """What is not the same on both sides, one line each: the size that pictures had, and their classes."""
    for name, images in reference.given.images.items():
        if few := images.enlarged():
            count, size = reference.features[name].moments.count, samples.image_size
            yield f"{few:,} of {count:,} images as {name} are smaller than the samples and were enlarged to {size} px"
    sets = [(labels, reference.given.images[name].class_names) for name, labels in reference.labels.items()]
    if samples.labels is None or not sets:
        return
    for what, of in (("samples", samples.labels), *reference.labels.items()):
        if unknown := int((of < 0).sum()):
            yield f"{unknown:,} of {len(of):,} images ({what}) have no label: what is said of classes is without them"
    named = None not in (samples.class_names, *(own for _, own in sets))
    if reference.settings.wants("fd-per-class") and not named:
        unnamed = "samples name" if samples.class_names is None else "reference names"
        yield f"FD per class({reference.network.name}) pairs classes by their numbers: the {unnamed} none"
    if samples.class_names is None and (samples.settings or {}).get("num_classes") in (0, 1):
        return  # of a generator without classes
    own = class_counts(samples.labels, samples.class_names, named)
    known = sum((class_counts(*one, named) for one in sets), Counter[str | int]())
    apart, is_shift = class_shift(own, known, derive_seed(reference.settings.seed, "classes"))
    shared = own.keys() & known.keys()
    if own.keys() != known.keys() and (is_shift or not shared):
        yield (
            f"samples of {len(own):,} classes, a reference of {len(known):,}, and {len(shared):,} are in both (by "
            f"{'name' if named else 'number'}): every distance is also one of the classes"
        )
    elif is_shift:
        yield (
            f"samples and reference have their classes in other shares ({apart:.0%} of the images would have to be of "
            "another class): every distance is also one of the shares"
        )


def class_counts(labels: Tensor, class_names: Sequence[str] | None, named: bool) -> Counter[str | int]:
    """How many images each class has, by its name or its number; those of no known class (below 0) are left out."""
    names = class_names if named and class_names else ()
    found = Counter[int](labels[labels >= 0].tolist())
    return Counter({same_text(names[one]) if one < len(names) else one: count for one, count in found.items()})
