"""Batches as a function of the step.

There is no iterator state: `batch(step)` depends on (seed, step, data) alone, so a resumed run reads what the
uninterrupted one would have read, and W ranks together read what one rank with a W times larger batch would.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from consonar.data.labels import check_label, check_labels
from consonar.data.tokens import TokenStore
from consonar.data.transforms import center_crop, from_uint8
from consonar.errors import UserError
from consonar.seeding import generator, integers, permutation, uniform
from consonar.types import ImageBatch, IndexedSource, TokenBatch

MAX_THREADS = 16


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_items: int) -> Tensor:
    """(num_items,) int64. Kept because shuffling a million rows takes longer than a training step's data should."""
    return permutation(generator(seed, "order", epoch), num_items)


def batch_rows(step: int, batch_size: int, num_items: int, *, seed: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The rows that `rank` reads at `step`: (B,) int64 in [0, num_items).

    The items form one endless stream: a permutation of all rows for epoch 0, another for epoch 1, and so on, each drawn
    from (seed, epoch). Step k takes items [k * B * world_size, (k + 1) * B * world_size) of it, and a rank every
    world_size-th of these from its own number on. Nothing is dropped at the end of an epoch: a batch can span two.
    """
    assert step >= 0 and batch_size > 0 and num_items > 0 and 0 <= rank < world_size
    start = step * batch_size * world_size
    stop = start + batch_size * world_size
    parts = []
    for epoch in range(start // num_items, (stop - 1) // num_items + 1):
        offset = epoch * num_items
        parts.append(_permutation(seed, epoch, num_items)[max(start - offset, 0) : stop - offset])
    return torch.cat(parts)[rank::world_size]


def spread_rows(num_items: int, max_items: int, rng: torch.Generator) -> Tensor:
    """All rows, or with `max_items` > 0 at most that many: (n,) int64 in [0, num_items), rising.

    One row is drawn from each of n equal stretches, so that a set that is sorted by class is covered evenly, and one
    whose classes take turns is not seen at one of them alone, as it would be at equal steps.
    """
    count = min(max_items, num_items) if max_items else num_items
    edges = torch.arange(count + 1) * num_items // max(count, 1)
    lengths = edges.diff()
    return edges[:-1] + (uniform(rng, count, dtype=torch.float64) * lengths).long()


def _check_batching(num_items: int, batch_size: int, rank: int, world_size: int, name: str) -> None:
    if num_items == 0:
        raise UserError(f"data: {name} holds no items")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not a number of items, 1 or more")
    assert 0 <= rank < world_size


class TokenBatches:
    """Training batches of a token store; `batch(step)` is reproducible from (seed, step), see `batch_rows`.

    `batch_size` is per rank. Of a store with several views of each image, one view per item is drawn from (seed, step).
    Raises `UserError` for an empty store, a batch size below 1, and a store of which only some items have a label.
    """

    def __init__(self, store: TokenStore, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        _check_batching(len(store), batch_size, rank, world_size, str(store.path))
        self.store = store
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        # A store without classes trains one distribution: everything is class 0.
        self.labels = store.labels if store.num_classes else torch.zeros(len(store), dtype=torch.int64)

    @property
    def num_items(self) -> int:
        return len(self.store)

    def _read(self, rows: Tensor, views: Tensor) -> TokenBatch:
        return TokenBatch(tokens=self.store.read(rows, views), condition=self.labels[rows], indices=rows)

    def batch(self, step: int) -> TokenBatch:
        """tokens (B, N), condition (B,), indices (B,), all int64, for one optimiser step of this rank."""
        rows = batch_rows(
            step, self.batch_size, self.num_items, seed=self.seed, rank=self.rank, world_size=self.world_size
        )
        # Drawn for all ranks together, so that the number of ranks does not change which view an item shows.
        shape = (self.batch_size * self.world_size,)
        views = integers(generator(self.seed, "views", step), 0, self.store.num_views, *shape)
        return self._read(rows, views[self.rank :: self.world_size])

    def ordered(self, batch_size: int, max_items: int = 0) -> Iterator[TokenBatch]:
        """`spread_rows` in the order of the store, first view, for validation; the last batch may be short."""
        chosen = spread_rows(self.num_items, max_items, generator(self.seed, "ordered"))
        for rows in chosen.split(batch_size):
            yield self._read(rows, torch.zeros_like(rows))


class ImageBatches:
    """Training batches of images held in memory; `batch(step)` is reproducible from (seed, step), see `batch_rows`.

    `images` uint8 (n, H, W, 3); `labels` (n,) int64 or None (condition 0 for all); `batch_size` is per rank. `flip`
    mirrors half of the items, drawn from (seed, step). Raises `UserError` for no images or a batch size below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int,
        seed: int,
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3, "images: uint8 (n, H, W, 3)"
        assert labels is None or labels.shape == images.shape[:1], "labels: (n,)"
        _check_batching(len(images), batch_size, rank, world_size, "the image tensor")
        self.images = images
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.batch_size, self.seed, self.flip, self.rank, self.world_size = batch_size, seed, flip, rank, world_size

    @property
    def num_items(self) -> int:
        return len(self.images)

    def read(self, rows: Tensor) -> ImageBatch:
        """The items `rows` (B,), not mirrored: images (B, 3, H, W) float32 in [-1, 1], condition (B,), indices (B,)."""
        return ImageBatch(images=from_uint8(self.images[rows]), condition=self.labels[rows], indices=rows)

    def batch(self, step: int) -> ImageBatch:
        """images (B, 3, H, W) float32 in [-1, 1], condition (B,), indices (B,) for one optimiser step of this rank."""
        rows = batch_rows(
            step, self.batch_size, self.num_items, seed=self.seed, rank=self.rank, world_size=self.world_size
        )
        batch = self.read(rows)
        if not self.flip:
            return batch
        shape = (self.batch_size * self.world_size,)
        mirrored = integers(generator(self.seed, "flip", step), 0, 2, *shape).bool()
        mirrored = mirrored[self.rank :: self.world_size].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        images = torch.where(mirrored, batch.images.flip(-1), batch.images)
        return ImageBatch(images=images, condition=batch.condition, indices=rows)

    def ordered(self, batch_size: int, max_items: int = 0) -> Iterator[ImageBatch]:
        """`spread_rows` in order and not mirrored, for validation; the last batch may be short."""
        chosen = spread_rows(self.num_items, max_items, generator(self.seed, "ordered"))
        for rows in chosen.split(batch_size):
            yield self.read(rows)


class SourceBatches(ImageBatches):
    """The same batches of images that are read when they are needed, by several threads: for sets beyond memory.

    A condition is the label of the record read, as `labels.check_label` finds it for `num_classes` and `missing`; 0
    where `num_classes` is None, for models that read no classes. Labels that are known beforehand are checked at once.
    """

    def __init__(
        self,
        source: IndexedSource,
        image_size: int,
        *,
        num_classes: int | None,
        batch_size: int,
        seed: int,
        missing: int | None = None,
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batching(len(source), batch_size, rank, world_size, source.name)
        if num_classes is not None:
            check_labels(source, num_classes, missing)
        self.source, self.image_size, self.num_classes, self.missing = source, image_size, num_classes, missing
        self.batch_size, self.seed, self.flip, self.rank, self.world_size = batch_size, seed, flip, rank, world_size
        self.pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS))

    @property
    def num_items(self) -> int:
        return len(self.source)

    def read(self, rows: Tensor) -> ImageBatch:
        def read(index: int) -> tuple[np.ndarray, int]:
            record = self.source.read(index)
            pixels = np.asarray(center_crop(record.image, self.image_size))
            if self.num_classes is None:
                return pixels, 0
            return pixels, check_label(record.label, self.num_classes, record.name, self.missing)

        pixels, labels = zip(*self.pool.map(read, rows.tolist()), strict=True)
        images = from_uint8(torch.from_numpy(np.stack(pixels)))
        return ImageBatch(images=images, condition=torch.tensor(labels), indices=rows)
