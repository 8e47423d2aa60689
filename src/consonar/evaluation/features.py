"""The features of image sets that are streamed; those of references are kept in the cache folder.

Shapes: `B` batch, `F` features. Images are uint8 (B, H, W, 3) numpy arrays until the network is called.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consonar.distributed import ALONE, World, in_turn, of_every
from consonar.errors import UserError, reading
from consonar.evaluation.image_sets import ImageSet, hashed
from consonar.evaluation.inputs import as_input
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.lock import making
from consonar.files.readers import read_npz
from consonar.files.writers import cache_dir, keep
from consonar.metrics.distribution import InceptionScore, Moments
from consonar.networks import FeatureNetwork, ScoringNetwork
from consonar.seeding import derive_seed

CACHE_VERSION = 2
"""Of the feature cache: entries of other versions are not found."""
ImagesDone = Callable[[str, int, int], None]
"""Gets the name of a set of images, how many of them are done, and how many there are."""


@dataclass(frozen=True)
class Statistics:
    """What is kept of all images of a stream, however many they are."""

    moments: Moments
    """Of the features."""
    spatial: Moments | None = None
    """Of a `ScoringNetwork`: of the spatial features."""
    scores: InceptionScore | None = None
    """Of samples and a `ScoringNetwork`: of the class probabilities."""

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Adds a network's outputs for some images: (B, F), and of a `ScoringNetwork` (B, num_spatial), (B, K)."""
        for kept, output in zip((self.moments, self.spatial, self.scores), outputs, strict=False):
            if kept is not None:
                kept.update(output)


@dataclass(frozen=True, kw_only=True)
class FeatureSet(Statistics):
    """What is kept of a set of images: statistics of all, single vectors of some."""

    rows: Tensor
    """(R, F) float32: the features of images drawn from all, in the order of the set."""
    indices: Tensor
    """(R,) int64, rising: which images of the set these are."""
    places: Tensor
    """(count,) int64: the place of every image in the drawn order (`drawn_places`)."""
    content: str = ""
    """Of a reference: the SHA-256 of its pixels and their size, however it is cut into batches."""
    parts: tuple[Statistics, ...] = ()
    """Of disjoint parts, when they were asked for."""

    def first(self, count: int) -> "FeatureSet":
        """With no more than `count` vectors, the first of the drawn order."""
        if len(self.rows) <= count:
            return self
        kept = self.places[self.indices] < count
        return replace(self, rows=self.rows[kept], indices=self.indices[kept])

    @property
    def drawn(self) -> Tensor:
        """The vectors (R, F) in the drawn order."""
        return self.rows[self.places[self.indices].argsort()]


def drawn_places(images: ImageSet, settings: EvaluationSettings) -> tuple[Tensor, str]:
    """The place of every image in an order that is drawn by `seed` and the pixels, (count,); the SHA-256 of the pixels.

    No order of the set changes which images come first: of a sorted set the first ones would be those of a few classes.
    Equal pictures are told apart by how many came before. Holds 100 bytes an image while it reads.
    """
    digest, seen, numbers = hashlib.sha256(), Counter[bytes](), list[int]()
    key = derive_seed(settings.seed, "rows").to_bytes(8, "big", signed=True)
    for batch in hashed(images.stream(settings.batch_size), digest.update):
        for image in map(np.ascontiguousarray, batch):
            content = hashlib.blake2b(image.data, digest_size=16).digest()
            copy = seen[content].to_bytes(8, "big")
            seen[content] += 1
            numbers.append(int.from_bytes(hashlib.blake2b(content + copy, digest_size=8, key=key).digest(), "big"))
    order = np.argsort(np.array(numbers, np.uint64))
    return torch.from_numpy(order).argsort(), digest.hexdigest()


def extract_features(
    network: FeatureNetwork,
    images: ImageSet,
    settings: EvaluationSettings,
    places: Tensor | None = None,
    *,
    max_rows: int | None = None,
    part_of: Tensor | None = None,
    progress: ImagesDone | None = None,
    world: World = ALONE,
) -> FeatureSet:
    """Features of a set of images; keeps the moments of all, and the vectors of those at the first `max_rows` `places`.

    `places` (count,) are those of `drawn_places`, None: found here; `max_rows` None: `max_neighbours_images`. Of a
    `ScoringNetwork` also the moments of the spatial features. `part_of` (count,) int64 says which part every image is
    in (-1: in none), and asks for all of that of each part as well and for the Inception score. `progress` gets the
    set's name, the number of images done so far, and that of all. The processes of `world` take turns at the batches;
    all get the same. Raises UserError when the network gives another shape than it declares, or values that are not
    finite.
    """
    places = drawn_places(images, settings)[0] if places is None else places
    scoring = network if isinstance(network, ScoringNetwork) else None
    widths = (network.num_features, scoring.num_spatial) if scoring else (network.num_features,)
    members = [] if part_of is None else [part_of == part for part in range(int(part_of.max()) + 1)]
    whole, *parts = [
        Statistics(
            Moments(network.num_features),
            Moments(scoring.num_spatial) if scoring else None,
            InceptionScore.drawn(places[rows]) if scoring and part_of is not None else None,
        )
        for rows in (torch.ones_like(places, dtype=torch.bool), *members)
    ]
    kept = places < (settings.max_neighbours_images if max_rows is None else max_rows)
    # In one piece from the start: rows that wait between batches that come and go would hold several times their size.
    vectors, known = torch.empty(int(kept.sum()), network.num_features), 0

    def of_batch(batch: np.ndarray) -> tuple[int, tuple[Tensor, ...]]:
        inputs = as_input(batch, network)
        outputs: tuple[Tensor, ...] = scoring.outputs(inputs) if scoring else (network(inputs),)
        return len(batch), tuple(output.to("cpu", torch.float32) for output in outputs)

    for count, outputs in in_turn(of_batch, images.stream(settings.batch_size), world):
        first = whole.moments.count
        for output, width in zip(outputs, widths, strict=False):
            check_features(output, (count, width), network.name, images.name, first)
        here = slice(first, first + count)
        rows = outputs[0][kept[here]]
        vectors[known : known + len(rows)] = rows
        known += len(rows)
        whole.update(outputs)
        for part, rows_of_part in zip(parts, members, strict=True):
            part.update([output[rows_of_part[here]] for output in outputs])
        if progress:
            progress(images.name, whole.moments.count, len(places))
    indices = kept.nonzero()[:, 0]
    return FeatureSet(**vars(whole), rows=vectors, indices=indices, places=places, parts=tuple(parts))


def check_features(features: Tensor, shape: tuple[int, int], network: str, name: str, first: int) -> None:
    """Raises UserError unless the features of a batch, whose first image is number `first`, can be measured."""
    if features.shape != shape:
        raise UserError(f"feature network {network}: gives shape {tuple(features.shape)}, expected {shape}")
    finite = features.square().sum(1).isfinite()  # distances are of squares
    if not finite.all():
        image = first + int((~finite).nonzero()[0])
        what = "numbers whose squares are not float32" if features.isfinite().all() else "NaN or infinity"
        raise UserError(f"feature network {network}: gives {what} for image {image} of {name}")


def cached_features(
    network: FeatureNetwork,
    images: ImageSet,
    settings: EvaluationSettings,
    progress: ImagesDone | None = None,
    *,
    max_rows: int | None = None,
    world: World = ALONE,
) -> FeatureSet:
    """`extract_features` of a reference, kept in `cache_dir()/features`.

    The key hashes the pixels (so the size, too), the network's name, weights and kind, the precision, and where not all
    vectors are kept how many and the seed; a file with all vectors serves fewer, too. Reading the images once for it
    costs little beside the network. A file that cannot be written is left out with a line on stderr. Raises UserError
    when a cached file cannot be read: delete it.
    """
    places, content = drawn_places(images, settings)
    kind = "/spatial" if isinstance(network, ScoringNetwork) else ""
    kind += "" if settings.precision == "fp32" else f"/{settings.precision}"
    max_rows = settings.max_neighbours_images if max_rows is None else max_rows
    some = [f"{max_rows} by {settings.seed}"] if len(places) > max_rows else []
    parts = [
        f"{CACHE_VERSION}/{content}/{network.name}/{network.weights_sha256}/{kept}{kind}" for kept in (*some, "all")
    ]
    path, *others = (
        cache_dir() / "features" / f"{hashlib.sha256(part.encode()).hexdigest()[:32]}.npz" for part in parts
    )
    for there in (path, *others):
        if all(of_every(there.exists(), world)):
            held = max_rows if there == path else len(places)
            return kept_features(there, network, places, content, held).first(max_rows)
    # One process of `world` holds it: one that waited for it would be waited for by the one that has it. For another
    # job it does not wait either: the others of its own would take it for hung.
    with making(path, wait=world.size == 1) if world.is_main else nullcontext(lambda: None) as beat:
        if all(of_every(path.exists(), world)):  # another job has made it meanwhile
            return kept_features(path, network, places, content, max_rows)

        def advanced(name: str, done: int, total: int) -> None:
            beat()
            if progress:
                progress(name, done, total)

        features = extract_features(
            network, images, settings, places, max_rows=max_rows, progress=advanced, world=world
        )  # fmt: skip
        if world.is_main:
            arrays: dict[str, Any] = {"rows": features.rows.numpy(), "indices": features.indices.numpy()}
            for prefix, moments in (("", features.moments), ("spatial_", features.spatial)):
                if moments is not None:
                    arrays |= {f"{prefix}{key}": value for key, value in moments.state().items()}
            keep(path, lambda file: np.savez(file, **arrays))
    return replace(features, content=content)


def kept_features(path: Path, network: FeatureNetwork, places: Tensor, content: str, max_rows: int) -> FeatureSet:
    """Those of a file of the cache; `UserError` for a damaged one, and for one of other images or features."""
    remedy = "delete it, it is made again"
    known = read_npz(path, remedy=remedy)
    indices = (places < max_rows).nonzero()[:, 0]
    widths = {"": network.num_features}
    if isinstance(network, ScoringNetwork):
        widths["spatial_"] = network.num_spatial
    with reading(f"feature cache: {path}", "features", remedy):
        wanted = {"rows": (len(indices), network.num_features), "indices": (len(indices),)}
        for prefix, width in widths.items():
            wanted |= {f"{prefix}count": (), f"{prefix}mean": (width,), f"{prefix}scatter": (width, width)}
        for key, shape in wanted.items():
            if known[key].shape != shape or not np.isfinite(known[key]).all():
                raise ValueError(f"{key} is {known[key].shape}, not finite numbers in {shape}")
        counts = [int(known[f"{prefix}count"]) for prefix in widths]
        if counts != [len(places)] * len(counts) or not np.array_equal(known["indices"], indices):
            raise ValueError(f"of {counts[0]} images, not of these {len(places)}")
        spatial = {key.removeprefix("spatial_"): known[key] for key in known if key.startswith("spatial_")}
        return FeatureSet(
            moments=Moments.restored(known),
            spatial=Moments.restored(spatial) if spatial else None,
            rows=torch.from_numpy(known["rows"]),
            indices=indices,
            places=places,
            content=content,
        )
