"""From images to a token store, in shards: several processes share them, and what was ended goes on."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consonar.compiling import compiled
from consonar.data.bad_images import STREAM_START, BadImages
from consonar.data.captions import all_captions
from consonar.data.labels import LABEL_REMEDY, known_labels
from consonar.data.picture_files import ShardStream, prefetch
from consonar.data.tokens import StoreWriter, TokenStore, check_free, new_store
from consonar.data.transforms import VIEWS, from_uint8, make_views
from consonar.distributed import ALONE, World, barrier, seconds_of_patience
from consonar.errors import BadImage, UserError, check_choice, reading
from consonar.files.lock import Beat
from consonar.files.readers import home_expanded
from consonar.files.shared_work import SharedWork
from consonar.json_types import Json
from consonar.options import Range
from consonar.precision import casts, multiplying, pick_precision, with_weights
from consonar.records import Fetched, device_of, one_ahead, to_device
from consonar.types import ImageRecord, ImageSource, IndexedSource, Tokenizer

ITEMS_PER_SHARD = 1024
"""Of a source whose pictures have numbers; others have the shards they have, or are one."""
CAPTION_REMEDY = "; give them one, or leave --captions and --text-encoder away"
LEFT_OUT = "left-out.json"
"""Row in the shard and reason of its pictures that cannot be read."""


class Encoder:
    """What turns pictures into the items of a store; see `write_token_store`."""

    def __init__(self, tokenizer: Tokenizer, views: str, batch_size: int, precision: str, compile: bool) -> None:
        check_choice("views", views, VIEWS)
        Range(1).check("batch_size", batch_size)
        self.tokenizer, self.views = tokenizer, views
        self.device = device_of(tokenizer)
        self.precision = pick_precision(precision, self.device, "precision", "measuring")
        network = with_weights(tokenizer, self.precision, self.device)
        self.network = compiled(network, "latents") if compile else network
        self.images_per_call = max(1, batch_size // VIEWS[views])

    def write(
        self, source: ImageSource, shard: int, writer: StoreWriter, met: Callable[[int, BadImage], None] | None
    ) -> Iterator[int]:
        """Writes a shard of the source, and gives the number of its items so far; `met` gets row and reason of a
        picture that cannot be read (None: it is raised)."""
        pictures, rows = pictures_of(source, shard)
        depth = 3 * self.images_per_call
        items = prefetch(pictures, self.prepare, depth=depth, rows=rows, met=met)

        def encoded() -> Iterator[Fetched[dict[str, Any]]]:
            while batch := list(islice(items, self.images_per_call)):
                crops, labels, captions, names, small = zip(*batch, strict=True)
                writer.enlarged += sum(small)
                pixels = to_device(torch.from_numpy(np.stack(crops)), self.device)
                tokens = self.network.encode(from_uint8(pixels.flatten(0, 1)))  # (images * views, N)
                yield Fetched({"tokens": tokens.unflatten(0, pixels.shape[:2]), "about": (labels, captions, names)})

        multiplied = multiplying(self.precision, self.device, autocast=not casts(self.tokenizer))
        with contextlib.closing(items), torch.inference_mode(), multiplied:
            for done in one_ahead(encoded()):
                writer.write(done["tokens"].numpy(), *done["about"])
                yield writer.counts["items"]

    def prepare(self, record: ImageRecord) -> tuple[np.ndarray, int | None, str | None, str, bool]:
        """Crops of a picture, what is said of it, and whether it is enlarged."""
        size = self.tokenizer.image_size
        crops = np.stack([np.asarray(crop) for crop in make_views(record.image, self.views, size)])
        return crops, record.label, record.caption, record.name, min(record.image.size) < size


def num_shards(source: ImageSource) -> int:
    if isinstance(source, IndexedSource):
        return -(-len(source) // ITEMS_PER_SHARD)
    return source.num_shards if isinstance(source, ShardStream) else 1


def pictures_of(source: ImageSource, shard: int) -> tuple[Any, range | None]:
    """What `prefetch` walks through for a shard, and the rows of it, where they have numbers."""
    if isinstance(source, IndexedSource):
        start = shard * ITEMS_PER_SHARD
        return source, range(start, min(start + ITEMS_PER_SHARD, len(source)))
    return (source.shard(shard) if isinstance(source, ShardStream) else source), None


def settings_of(source: ImageSource, tokenizer: Tokenizer, encoder: Encoder) -> Json:
    """What the tokens, labels and captions depend on, of what is known before pictures are read."""
    labels = known_labels(source)
    return {
        "tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint, "views": encoder.views,
        "precision": encoder.precision, "source": source.name, "content": getattr(source, "content_hash", None),
        "classes": source.class_names, "labels": labels and hashlib.sha256(repr(labels).encode()).hexdigest(),
        "shards": num_shards(source), "items_per_shard": ITEMS_PER_SHARD,
    }  # fmt: skip


@dataclass
class Shards:
    """The shards of a store that is being made: each a store of its own, and what was left out of it."""

    work: SharedWork
    source: ImageSource
    encoder: Encoder
    bad: BadImages
    part: str
    progress: Callable[[int, int | None], None] | None
    captions: bool
    """Whether every picture must have one."""
    done: int = 0
    """Images in the shards that were made, or found, here."""

    def __post_init__(self) -> None:
        self.total = len(self.source) if isinstance(self.source, Sized) else None
        self.paths = [self.work.folder / f"shard_{index:08d}.tokens" for index in range(num_shards(self.source))]

    def new(self, path: Path, **more: Any) -> contextlib.AbstractContextManager[StoreWriter]:
        """`new_store` of these pictures."""
        encoder, source = self.encoder, self.source
        return new_store(
            path, encoder.tokenizer, VIEWS[encoder.views], source.class_names, views=encoder.views, source=source.name,
            precision=encoder.precision, **more,
        )  # fmt: skip

    def make(self, index: int, beat: Beat) -> None:
        """Makes a shard where it is not there, and counts what was left out of it."""
        path, left_out = self.paths[index], dict[int, str]()

        def met(row: int, error: BadImage) -> None:
            left_out[row] = str(error)
            self.met(index, row, error)

        if path.exists():
            left_out = left_out_of(path)
            for row, reason in left_out.items():
                met(row, BadImage(reason))
        else:
            with self.new(path, may_be_empty=True) as writer:
                for count in self.encoder.write(self.source, index, writer, met if self.bad.skips else None):
                    beat()
                    if self.progress:
                        self.progress(self.done + count, self.total)
                writer.left_out = len(left_out)
                (writer.folder / LEFT_OUT).write_text(json.dumps(list(left_out.items())))
        with removed_if_damaged(path):
            store = TokenStore.open(path)
        self.done += len(store) + len(left_out)
        self.check_labels(store)
        if self.captions:
            where, names = f"--captions: {self.source.name}, shard {index}", store.table["name"]
            all_captions(store.captions, where, CAPTION_REMEDY, called=lambda row: str(names[row]))

    def check_labels(self, store: TokenStore) -> None:
        """Raises `UserError` where this shard has labels and the first one that is there has none, or the reverse: the
        store of all would be refused, at the end of the job."""
        others = (TokenStore.open(path) for path in self.paths if path.exists())
        first = next((other for other in others if len(other)), store)
        bare = [one for one in (first, store) if len(one) and not one.metadata.counts.labelled]
        if len(bare) == 1 and len(store):
            raise UserError(f"{bare[0].table['name'][0]}: no label, though the data have classes; {LABEL_REMEDY}")

    def met(self, index: int, row: int, error: BadImage) -> None:
        """`BadImages.met`; where nothing is to be left out, one that an earlier call left out stops this one."""
        if not self.bad.skips:
            raise error
        seen = max(self.done + row + 1, STREAM_START) if self.total is None else self.total
        self.bad.met(self.part, index << 32 | row, error, seen)

    def finish(self, beat: Beat) -> None:
        """Makes the store of all shards, and the list of what was left out."""
        found: dict[int, str] = {}
        read = 0
        with self.new(self.work.out, source_sha256=getattr(self.source, "content_hash", None)) as writer:
            for path in self.paths:
                beat()
                store = whole(path)
                found |= {read + row: reason for row, reason in left_out_of(path).items()}
                for batch in store.table.to_batches():
                    columns = (batch.column(name).to_pylist() for name in ("label", "caption", "name"))
                    tokens = batch.column("tokens").flatten().to_numpy()
                    writer.write(tokens.reshape(-1, store.num_views, store.num_tokens), *columns)
                read += len(store) + store.metadata.left_out
                writer.enlarged += store.metadata.enlarged
            writer.left_out = len(found)
            if writer.counts["items"] == 0:
                shutil.rmtree(self.work.folder)  # the next call looks again
            if self.bad.skips:
                self.bad.record(self.part, read, found)


def left_out_of(path: Path) -> dict[int, str]:
    with removed_if_damaged(path), reading(path / LEFT_OUT, "a list of pictures"):
        return {int(row): str(reason) for row, reason in json.loads((path / LEFT_OUT).read_bytes())}


def whole(path: Path) -> TokenStore:
    """The tokens of a shard, all of them read."""
    with removed_if_damaged(path):
        store = TokenStore.open(path)
        store.check_content()
    return store


@contextlib.contextmanager
def removed_if_damaged(shard: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        shutil.rmtree(shard, ignore_errors=True)
        raise UserError(f"{shard}: was damaged, and is removed; the same command makes it again ({error})") from error


def write_token_store(
    path: str | Path,
    source: ImageSource,
    tokenizer: Tokenizer,
    *,
    views: str = "center",
    batch_size: int = 64,
    precision: str = "fp32",
    compile: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    bad: BadImages | None = None,
    part: str = "train",
    settings: Mapping[str, object] | None = None,
    captions: bool = False,
    world: World = ALONE,
) -> TokenStore:
    """Tokenise every image of `source` and return the store, opened.

    `views`: which crops of each image (`VIEWS`), square, `tokenizer.image_size` pixels. `tokenizer`, on any device,
    gets about `batch_size` crops at a time, while threads decode the next ones, and multiplies in `precision` (one of
    `precision.CHOICES`); `compile` compiles its `latents`. `progress(done, total)` is called after each of these calls
    with numbers of images; total is None when the source does not know it. `bad` says what is done about images that
    cannot be read (None: stop at the first), which it lists as those of `part`.

    Processes that call it alike share the shards of PATH.parts (`SharedWork`), and a later call goes on with those that
    are there; `settings` are further ones that have to be the same. Raises `UserError` as `new_store`, `SharedWork` and
    the source do, and with `captions` at the first shard in which a picture has none. `world`: the processes of
    torchrun that call it together.
    """
    path, bad = home_expanded(path), bad or BadImages()
    encoder = Encoder(tokenizer, views, batch_size, precision, compile)
    if isinstance(source, Sized) and len(source) == 0:
        raise UserError(f"data: {source.name} holds no items")
    given = settings_of(source, tokenizer, encoder) | dict(settings or {})
    work = SharedWork(
        out=path, settings=given, what="tokens", unread=("tokenizer",), old={}, patience=seconds_of_patience()
    )
    bad.forget(part)
    # Twice: as shards, of which some may be there, and as the store that is made of them.
    there = ITEMS_PER_SHARD * sum(1 for _ in work.folder.glob("shard_*.tokens"))
    check_free(path, max(2 * len(source) - there, 0) if isinstance(source, Sized) else 0, tokenizer, VIEWS[views])
    shards = Shards(work, source, encoder, bad, part, progress, captions)
    barrier(world)  # nobody looks for the store after another process has made it
    work.run(shards.paths, shards.make, shards.finish)
    return TokenStore.open(path)
