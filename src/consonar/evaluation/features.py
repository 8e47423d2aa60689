"""The features of image sets that are streamed; those of references are kept in the cache folder.

Shapes: `B` batch, `F` features. Images are uint8 (B, H, W, 3) numpy arrays until the network is called.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError, reading
from consonar.evaluation.inputs import ImageSet, as_input
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_npz
from consonar.files.writers import cache_dir, keep
from consonar.metrics.distribution import InceptionScore, Moments
from consonar.networks import FeatureNetwork, ScoringNetwork
from consonar.seeding import derive_seed, generator

CACHE_VERSION = 2
"""Of the feature cache: entries of other versions are not found."""
ImagesDone = Callable[[str, int], None]
"""Gets the name of a set of images, and how many of them are done."""


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
    """(min(count, max_rows), F) float32: the features of images drawn from all, for neighbours."""
    indices: Tensor
    """(min(count, max_rows),) int64, rising: which images of the set these are."""
    content: str = ""
    """Of a reference: the SHA-256 of its pixels and their size, however it is cut into batches."""
    parts: tuple[Statistics, ...] = ()
    """Of disjoint parts, when they were asked for."""


class RowDraw:
    """Keeps the feature vectors of `max_rows` pictures of a stream, drawn with `seed`; of a shorter stream all.

    No order of the stream changes the subset: every picture gets a number from its pixels and the seed, and the
    smallest stay ("bottom-k sampling"). The first ones of a sorted set would be those of its first classes. Equal
    pictures are told apart by how many came before. Beside the vectors it holds 100 bytes for each picture seen.
    """

    def __init__(self, max_rows: int, seed: int) -> None:
        self.max_rows, self.seed, self.count = max_rows, seed.to_bytes(8, "big", signed=True), 0
        self.seen: Counter[bytes] = Counter()
        self.kept: list[tuple[int, int, Tensor]] = []
        """A heap of (number less than 0, row in the stream, vector (F,)): the first one has the largest number."""

    def update(self, images: np.ndarray, vectors: Tensor) -> None:
        """Adds pictures, uint8 (B, H, W, 3), and their features (B, F)."""
        for image, vector in zip(images, vectors, strict=True):
            content = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
            copy = self.seen[content].to_bytes(8, "big")
            self.seen[content] += 1
            number = int.from_bytes(hashlib.blake2b(content + copy, digest_size=8, key=self.seed).digest(), "big")
            if len(self.kept) < self.max_rows:
                heapq.heappush(self.kept, (-number, self.count, vector.clone()))
            elif -number > self.kept[0][0]:
                heapq.heapreplace(self.kept, (-number, self.count, vector.clone()))
            self.count += 1

    def result(self, num_features: int) -> tuple[Tensor, Tensor]:
        """The vectors (R, F) float32 and their rows in the stream (R,) int64, rising."""
        kept = sorted(self.kept, key=lambda entry: entry[1])
        rows = torch.tensor([row for _, row, _ in kept], dtype=torch.int64)
        return (torch.stack([vector for *_, vector in kept]) if kept else torch.zeros(0, num_features)), rows


def extract_features(
    network: FeatureNetwork,
    images: ImageSet,
    settings: EvaluationSettings,
    part_of: Tensor | None = None,
    progress: ImagesDone | None = None,
) -> FeatureSet:
    """Features of a set of images; keeps the moments of all, and the vectors of `max_neighbours_images`, drawn.

    Of a `ScoringNetwork` also the moments of the spatial features. `part_of` (count,) int64 says which part every
    image is in (-1: in none), and asks for all of that of each part as well and for the Inception score, over splits
    drawn by the seed. `progress` gets the set's name and the number of images done so far. Raises UserError when the
    network gives another shape than it declares, or values that are not finite.
    """
    scoring = network if isinstance(network, ScoringNetwork) else None
    widths = (network.num_features, scoring.num_spatial) if scoring else (network.num_features,)
    sizes = [] if part_of is None else [len(part_of), *torch.bincount(part_of[part_of >= 0]).tolist()]
    rngs = [generator(settings.seed, "splits", i) for i in range(len(sizes))]
    scores = [InceptionScore.drawn(*drawn) if scoring else None for drawn in zip(sizes, rngs, strict=True)]
    spatial = scoring.num_spatial if scoring else None
    whole, *parts = [
        Statistics(Moments(network.num_features), Moments(spatial) if spatial else None, score)
        for score in scores or [None]
    ]
    drawn = RowDraw(settings.max_neighbours_images, derive_seed(settings.seed, "rows"))
    for batch in images.stream(settings.batch_size):
        inputs, first = as_input(batch, network), whole.moments.count
        outputs: tuple[Tensor, ...] = scoring.outputs(inputs) if scoring else (network(inputs),)
        outputs = tuple(output.to("cpu", torch.float32) for output in outputs)
        for output, width in zip(outputs, widths, strict=False):
            check_features(output, (len(batch), width), network.name, images.name, first)
        drawn.update(batch, outputs[0])
        whole.update(outputs)
        members = None if part_of is None else part_of[first : first + len(batch)]  # (B,)
        for index, part in enumerate(parts):
            part.update([output[members == index] for output in outputs])
        if progress:
            progress(images.name, whole.moments.count)
    rows, indices = drawn.result(network.num_features)
    return FeatureSet(**vars(whole), rows=rows, indices=indices, parts=tuple(parts))


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
    network: FeatureNetwork, images: ImageSet, settings: EvaluationSettings, progress: ImagesDone | None = None
) -> FeatureSet:
    """`extract_features` of a reference, kept in `cache_dir()/features`.

    The key hashes the pixels (so the size, too), the network's name, weights and kind, the precision, and where not all
    vectors are kept how many and the seed; reading the images once for it costs little beside the network. A file that
    cannot be written is left out with a line on stderr. Raises UserError when a cached file cannot be read: delete it.
    """
    digest, count = hashlib.sha256(), 0
    for batch in images.stream(settings.batch_size):
        digest.update(repr(batch.shape[1:]).encode() if count == 0 else b"")
        digest.update(np.ascontiguousarray(batch).data)
        count += len(batch)
    content, kind = digest.hexdigest(), "/spatial" if isinstance(network, ScoringNetwork) else ""
    kind += "" if settings.precision == "fp32" else f"/{settings.precision}"
    max_rows = settings.max_neighbours_images
    kept = f"{max_rows} by {settings.seed}" if count > max_rows else "all"
    parts = f"{CACHE_VERSION}/{content}/{network.name}/{network.weights_sha256}/{kept}{kind}"
    path = cache_dir() / "features" / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        remedy = "delete it, it is made again"
        known = read_npz(path, remedy=remedy)
        spatial = {key.removeprefix("spatial_"): known[key] for key in known if key.startswith("spatial_")}
        with reading(f"feature cache: {path}", "features", remedy):
            return FeatureSet(
                moments=Moments.restored(known),
                spatial=Moments.restored(spatial) if spatial else None,
                rows=torch.from_numpy(known["rows"]),
                indices=torch.from_numpy(known["indices"]),
                content=content,
            )
    features = extract_features(network, images, settings, progress=progress)
    arrays: dict[str, Any] = {"rows": features.rows.numpy(), "indices": features.indices.numpy()}
    for prefix, moments in (("", features.moments), ("spatial_", features.spatial)):
        if moments is not None:
            arrays |= {f"{prefix}{key}": value for key, value in moments.state().items()}
    keep(path, lambda file: np.savez(file, **arrays))
    return replace(features, content=content)
