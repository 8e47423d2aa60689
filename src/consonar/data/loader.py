"""Batches as a function of the step.

There is no iterator state: `batch(step)` depends on (seed, step, data) alone, so a resumed run reads what the
uninterrupted one would have read, and W ranks together read what one rank with a W times larger batch would.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Generic, NotRequired, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor

from consonar.data.captions import CaptionFeatures
from consonar.data.labels import check_label, check_labels
from consonar.data.mixture import TokenStores
from consonar.data.picture_files import decoding_threads
from consonar.data.tokens import TokenStore
from consonar.data.transforms import center_crop, from_uint8
from consonar.errors import UserError
from consonar.options import Range
from consonar.seeding import derive_seed, generator, integers, permutation, rows_of_rank, spread
from consonar.types import ImageBatch, ImageRecord, ImageSource, IndexedSource, TokenBatch

Item = TypeVar("Item")
MANY = 2**31
"""Numbers that choose among the captions of an item, whose count divides them nearly evenly."""
BLOCK = 10_000
"""Items after which several stores have given exactly their shares."""
MAX_MEMORY = 4e9
"""Bytes of decoded images held in memory; a larger source is read again in every epoch, and must be `IndexedSource`."""


@lru_cache(maxsize=64)
def _epochs(seed: int, num_items: int) -> Callable[[int], Tensor]:
    """The order of every epoch, (num_items,) int64. Two are kept, because shuffling a million rows takes longer than a
    training step's data should."""
    return lru_cache(maxsize=2)(lambda epoch: permutation(generator(seed, "order", epoch), num_items))


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
        parts.append(_epochs(seed, num_items)(epoch)[max(start - offset, 0) : stop - offset])
    return torch.cat(parts)[rank::world_size]


def shares(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK` items each store gives, by largest remainder; `UserError` for one that gives none."""
    exact = [weight * BLOCK / math.fsum(weights) for weight in weights]
    counts = [math.floor(number) for number in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: BLOCK - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        raise UserError(f"data.weights: {weights[counts.index(0)]} is less than one item of {BLOCK:,}; leave it out")
    return counts


@lru_cache(maxsize=4)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of every item of a block its store, and how many of that store there were before it; (BLOCK,) int64 both."""
    stores = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    stores = stores[permutation(generator(seed, "mixture", block), BLOCK)]
    taken = torch.nn.functional.one_hot(stores, len(counts)).cumsum(0) - 1  # (BLOCK, stores)
    before = block * torch.tensor(counts)[stores]
    return stores, before + taken.gather(1, stores[:, None])[:, 0]


def mixed_rows(
    step: int, batch_size: int, sizes: Sequence[int], counts: Sequence[int], *, seed: int, rank: int, world_size: int
) -> Tensor:
    """As `batch_rows`, of stores of these `sizes` whose items are numbered one store after the other.

    Of every `BLOCK` items of the stream exactly `counts` are of each store, in an order drawn from (seed, block). The
    items of a store follow each other in epochs of its own: none comes again before all have come.
    """
    start, size = step * batch_size * world_size, batch_size * world_size
    rows, first_rows = [], [sum(sizes[:index]) for index in range(len(sizes))]
    for place in range(start + rank, start + size, world_size):
        stores, before = _block(seed, place // BLOCK, tuple(counts))
        store, number = int(stores[place % BLOCK]), int(before[place % BLOCK])
        epoch, item = divmod(number, sizes[store])
        rows.append(first_rows[store] + int(_epochs(derive_seed(seed, "store", store), sizes[store])(epoch)[item]))
    return torch.tensor(rows)


class Place(TypedDict):
    """Which items a process reads: `batch_size` at each step, drawn by `seed`, its share of those of all processes."""

    batch_size: int
    seed: int
    rank: NotRequired[int]
    world_size: NotRequired[int]


class Batches(ABC, Generic[Item]):
    """Batches of `num_items` numbered items; `batch(step)` is reproducible from (seed, step), see `batch_rows`.

    `batch_size` is per rank. Raises `UserError`, which names `where` they come from, for no items and for a batch size
    below 1.
    """

    def __init__(
        self, num_items: int, where: str, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_items == 0:
            raise UserError(f"data: {where} holds no items")
        Range(1).check("batch_size", batch_size)
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.rank, self.world_size = rank, world_size

    @abstractmethod
    def read(self, rows: Tensor) -> Item:
        """The items `rows` (B,) as they are held."""

    def batch(self, step: int) -> Item:
        """For one optimiser step of this rank."""
        return self.read(self.rows(step))

    def rows(self, step: int) -> Tensor:
        """(B,) int64: the items of this rank at one optimiser step."""
        return batch_rows(
            step, self.batch_size, self.num_items, seed=self.seed, rank=self.rank, world_size=self.world_size
        )

    def draw(self, name: str, step: int, high: int) -> Tensor:
        """(B,) int64 in [0, high), one number for each item of `rows(step)`, whatever the number of ranks."""
        rng = generator(self.seed, name, step)
        return rows_of_rank(lambda count: integers(rng, 0, high, count), self.batch_size, self.rank, self.world_size)

    def ordered(self, batch_size: int, max_items: int = 0) -> Iterator[Item]:
        """All items, or with `max_items` > 0 at most that many, in order and as they are held, for validation.

        Which ones is drawn (`seeding.spread`). The last batch may be short.
        """
        rows = spread(generator(self.seed, "ordered"), max_items or self.num_items, self.num_items)
        return map(self.read, rows.split(batch_size))


class TokenBatches(Batches[TokenBatch]):
    """Batches of a token store: tokens (B, N), condition (B,), indices (B,), all int64; or, of an item's caption each
    (of several one that is drawn from (seed, step)), conditions as `captions` has them.

    Of a store with several views of each image, one view per item is drawn from (seed, step); `read` takes the first.
    Of several stores each gives its share of `weights` (`mixed_rows`); without them all are read as one.
    Raises `UserError` also for a store of which only some items have a label, and for other than one weight a store.
    """

    def __init__(
        self,
        store: TokenStore | TokenStores,
        weights: Sequence[float] = (),
        captions: CaptionFeatures | None = None,
        **place: Unpack[Place],
    ) -> None:
        super().__init__(len(store), str(store.path), **place)
        self.store, self.captions, self.shares = store, captions, shares(weights) if weights else []
        sizes = store.sizes if isinstance(store, TokenStores) else [len(store)]
        if weights and len(weights) != len(sizes):
            raise UserError(f"data.weights: {len(weights)} weights for {len(sizes)} stores; give one for each")
        self.sizes = sizes
        # A store without classes trains one distribution: everything is class 0.
        labelled = store.num_classes and captions is None
        self.labels = store.labels if labelled else torch.zeros(len(store), dtype=torch.int64)

    def read(self, rows: Tensor, views: Tensor | None = None, draws: Tensor | None = None) -> TokenBatch:
        """The items `rows` (B,), each in its view of `views` (B,), with the caption that `draws` (B,) choose."""
        tokens = self.store.read(rows, torch.zeros_like(rows) if views is None else views)
        condition = self.labels[rows] if self.captions is None else self.captions.read(rows, draws)
        return TokenBatch(tokens=tokens, condition=condition, indices=rows)

    def rows(self, step: int) -> Tensor:
        if not self.shares:
            return super().rows(step)
        place = {"seed": self.seed, "rank": self.rank, "world_size": self.world_size}
        return mixed_rows(step, self.batch_size, self.sizes, self.shares, **place)

    def batch(self, step: int) -> TokenBatch:
        views = self.draw("views", step, self.store.num_views)
        return self.read(self.rows(step), views, self.draw("captions", step, MANY))


class ImageBatches(Batches[ImageBatch]):
    """Batches of images: images (B, 3, H, W) float32 in [-1, 1], condition (B,) and indices (B,) int64.

    `load` gives the images (n, H, W, 3) uint8 and conditions (n,) of rows (n,); with `captions` the conditions are
    those of the rows, of several one that is drawn. `flip` mirrors half of the items. Both are drawn from (seed, step).
    """

    def __init__(
        self,
        num_items: int,
        where: str,
        load: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        flip: bool = False,
        captions: CaptionFeatures | None = None,
        **place: Unpack[Place],
    ) -> None:
        super().__init__(num_items, where, **place)
        self.load, self.flip, self.captions = load, flip, captions

    def read(self, rows: Tensor, draws: Tensor | None = None) -> ImageBatch:
        images, labels = self.load(rows)
        if self.captions is None:
            return ImageBatch(images=from_uint8(images), condition=labels, indices=rows)
        condition, words = self.captions.read(rows, draws), self.captions.words(rows, draws)
        return ImageBatch(from_uint8(images), condition, rows, words)

    def batch(self, step: int) -> ImageBatch:
        batch = self.read(self.rows(step), self.draw("captions", step, MANY))
        if not self.flip:
            return batch
        mirrored = self.draw("flip", step, 2).bool().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return replace(batch, images=torch.where(mirrored, batch.images.flip(-1), batch.images))


def item_of(
    record: ImageRecord, image_size: int, num_classes: int | None, missing: int | None
) -> tuple[np.ndarray, int]:
    """The centre crop of a picture, (S, S, 3) uint8, and its condition (`labels.check_label`)."""
    condition = check_label(record.label, num_classes, record.name, missing)
    return np.asarray(center_crop(record.image, image_size)), condition


def stacked(items: Iterable[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Images (n, S, S, 3) uint8 and conditions (n,) int64 of one item or more."""
    pixels, conditions = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(conditions)


def image_batches(
    source: ImageSource,
    image_size: int,
    *,
    num_classes: int | None = None,
    missing: int | None = None,
    flip: bool = False,
    captions: CaptionFeatures | None = None,
    **place: Unpack[Place],
) -> ImageBatches:
    """Batches of images and conditions (`item_of`): from memory where all of them fit, else, and where the source keeps
    what it draws, read by threads when they are needed; labels that are known beforehand are checked here."""
    kept: bool = getattr(source, "keeps_pictures", False)
    if isinstance(source, IndexedSource) and (kept or len(source) * 3 * image_size**2 > MAX_MEMORY):
        check_labels(source, num_classes, missing)
        pool = decoding_threads()

        def item(index: int) -> tuple[np.ndarray, int]:
            return item_of(source.read(index), image_size, num_classes, missing)

        count, load = len(source), lambda rows: stacked(pool.map(item, rows.tolist()))
    else:
        images, conditions = load_images(source, image_size, num_classes=num_classes, missing=missing)
        count, load = len(images), lambda rows: (images[rows], conditions[rows])
    return ImageBatches(count, source.name, load, flip=flip, captions=captions, **place)


def load_images(
    source: ImageSource, image_size: int, *, num_classes: int | None = None, missing: int | None = None
) -> tuple[Tensor, Tensor]:
    """All images (n, S, S, 3) uint8 of a source, and their conditions (n,), see `item_of`; `UserError` for more of them
    than `MAX_MEMORY`."""
    check_labels(source, num_classes, missing)
    items, room = list[tuple[np.ndarray, int]](), MAX_MEMORY // (3 * image_size**2)
    for record in source:
        if len(items) >= room:
            held = f"holds over {room:,.0f} pictures of {image_size} px, {MAX_MEMORY / 1e9:.3g} GB in every process"
            remedy = (
                "put shards (tars as they are, Parquet in row groups of 268 MB at most, Arrow) or a folder on this "
                "machine, or take hf: for hf-stream:"
            )
            raise UserError(f"data.images: {source.name} {held}, and is read from its beginning alone; {remedy}")
        items.append(item_of(record, image_size, num_classes, missing))
    if not items:
        raise UserError(f"data.images: {source.name} holds no image")
    return stacked(items)
