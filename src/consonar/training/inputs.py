"""What runs read: token stores, pictures, what is held out of them; and what a trainee makes beside: previews, FD."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from consonar.components import read_origin, save_generator
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.image_folder import other_files
from consonar.data.labels import describe
from consonar.data.loader import PictureBatches
from consonar.data.picture_files import save_grid
from consonar.data.sources import Part, choices, open_source
from consonar.data.tokens import TokenStore
from consonar.distributed import World
from consonar.errors import MissingSplit, UserError, reading
from consonar.files.readers import home_expanded, read_json
from consonar.files.writers import write_json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.networks import load_feature_network
from consonar.origin import Origin, check
from consonar.records import device_of, to_device
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.seeding import generator, permutation
from consonar.training.config import TrainConfig
from consonar.types import Generator, ImageSource, IndexedSource, Tokenizer

PREVIEW_IMAGES = 16
NETWORK = "efficientnet-lite0"
METRIC = f"FD({NETWORK}) validation"
HELD_OUT = 0.05
"""Share of the training pictures that a tokenizer is validated on where the data have no split for it."""


def open_store(path: str | None, key: str, tokenizer: str, views: str | None = None) -> TokenStore:
    """A whole token store, and of these views, or a `UserError` that says how to make one with the tokenizer."""
    command = f"consonar tokenize --tokenizer {tokenizer}{f' --views {views}' if views else ''}"
    if not path:
        raise UserError(f"{key}: no token store given; make one with: {command} --data ... --out DIR")
    if not home_expanded(path).exists():
        split = " --split validation" if "validation" in key else ""
        raise UserError(f"{key}: no token store at {path}; make it with: {command} --data openmoji{split} --out {path}")
    store = TokenStore.open(path)
    if views not in (None, store.metadata.views):
        held = store.metadata.views
        raise UserError(f"{key}: {path} holds the views {held}, data.views is {views}; make one with: {command} ...")
    store.check_content()
    return store


def open_held_out(path: str, tokenizer: str, store: TokenStore) -> TokenStore:
    """A token store to validate on what is trained on `store`.

    Raises `UserError` unless label i means the same in both, and training has every label of validation.
    """
    held_out = open_store(path, "data.validation_tokens", tokenizer)
    where, remedy = f"data.validation_tokens: {held_out.path}", "tokenize both as splits of one data set"
    check(where, held_out.origin, store.origin, str(store.path), remedy)
    several = held_out.num_classes > store.num_classes or bool(held_out.num_classes) != bool(store.num_classes)
    if several or (held_out.class_names is None) != (store.class_names is None):
        ours, theirs = (
            f"{s.num_classes} classes{'' if s.class_names else ' without names'}" if s.num_classes else "no classes"
            for s in (held_out, store)
        )
        raise UserError(f"{where} has {ours}, {store.path} has {theirs}; {remedy}")
    return held_out


@dataclass(frozen=True)
class Pictures:
    """The image sources of a run, with lines that say what they are, and what cannot be read of them."""

    train: ImageSource
    held_out: ImageSource | None
    about: tuple[str, ...]
    bad: BadImages

    @property
    def origin(self) -> Origin:
        """What is made of them; a stream has no hash."""
        train, held_out = (getattr(source, "content_hash", None) for source in (self.train, self.held_out))
        names = self.train.class_names
        return Origin(class_names=names, data=self.train.name, data_sha256=train, validation_sha256=held_out)


def open_pictures(config: TrainConfig, image_size: int, run: Path) -> Pictures:
    """The pictures of `config.data`; `run` is the folder where an earlier part of the run has listed bad ones.

    Both splits are opened before a picture is decoded. For a tokenizer, where the data have no split `validation`, a
    part of the training pictures is held out, drawn by the run's seed. Raises `UserError` where no images are named,
    and as `open_source`, `hold_out` and `leave_out` do.
    """
    train, held_out, share = open_images(config, "train", image_size), None, None
    wanted = config.data.validation_split
    if wanted and wanted.endswith("%"):
        share = float(wanted.removesuffix("%")) / 100  # its form is checked by the configuration
    else:
        try:
            held_out = open_images(config, wanted or "validation", image_size)
        except MissingSplit as error:
            if wanted:
                raise
            share = HELD_OUT if config.run == "tokenizer" else None
            if share and not isinstance(train, IndexedSource):
                raise UserError(f"data.validation_split: {error}; name one of them") from error
    notes = [f"not read: {note}" for note in {other_files(train), other_files(held_out)} if note]
    bad = BadImages(config.data.bad_images, config.data.bad_images_limit, run / "bad-images.txt", resume=True)
    train = leave_out(train, bad, "train")
    held_out = None if held_out is None else leave_out(held_out, bad, "validation")
    about = [*notes, bad.note] if bad.note else notes
    if share is not None:
        train, held_out = hold_out(train, share, config.seed)
        about.append(f"validation: {describe(held_out)}, held out of the split train by seed {config.seed}")
    return Pictures(train, held_out, (describe(train), *about), bad)


def open_images(config: TrainConfig, split: str, image_size: int) -> ImageSource:
    """One split of a run's images, with the classes and labels that it wants."""
    data = config.data
    if data.images is None:
        reader = "a tokenizer" if config.run == "tokenizer" else config.run
        raise UserError(f"data.images: {reader} needs the images themselves; choices: {choices()}")
    return open_source(
        data.images, split=split, image_size=image_size, classes=data.classes, label_default=data.label_default,
        model_classes=read_origin(config.init).class_names if config.init else None,
    )  # fmt: skip


def hold_out(source: ImageSource, share: float, seed: int) -> tuple[Part, Part]:
    """The source without a `share` of its pictures, and that share, drawn by `seed`.

    Raises `UserError` for a stream, whose pictures have no numbers, and where either part would be empty.
    """
    if not isinstance(source, IndexedSource):
        raise UserError(f"data.validation_split: nothing can be held out of {source.name}; name a split of the data")
    total = len(source)
    count = max(1, round(share * total))
    if count >= total:
        raise UserError(f"data.validation_split: {count} of {total} pictures held out leave none to train on")
    order = permutation(generator(seed, "held out"), total)
    rows, rest = sorted(order[:count].tolist()), sorted(order[count:].tolist())
    return Part(source, rest, f"{source.name}[without {count}]"), Part(source, rows, f"{source.name}[{count} held out]")


def preview_samples(model: Generator, tokenizer: Tokenizer, path: Path) -> None:
    labels = balanced_labels(PREVIEW_IMAGES, max(1, model.num_classes))
    save_grid(sample(model, tokenizer, labels).images, path, columns=8)


def preview_reconstructions(tokenizer: Tokenizer, validation: PictureBatches, world: World, path: Path) -> None:
    rows = torch.linspace(0, validation.num_items - 1, min(PREVIEW_IMAGES, validation.num_items)).long()
    images = to_device(validation.read(rows), world.device).images
    pairs = torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)
    save_grid(pairs, path, columns=8)


@dataclass
class KeepBest:
    """Keeps the state of a generator whose samples have the lowest Fréchet distance so far to the validation images.

    It is in best/ of the run `folder`, step and value in best.json. `num_samples` are drawn at temperature 1, of the
    same seeds at every step.
    """

    model: Generator
    validation: PictureBatches
    tokenizer: Tokenizer
    num_samples: int
    folder: Path
    origin: Origin

    def __post_init__(self) -> None:
        self.network = load_feature_network(NETWORK, str(device_of(self.tokenizer)))
        self.batch_size = self.validation.batch_size
        self.target = self.moments(batch.images for batch in self.validation.ordered(self.batch_size))
        if self.target.count < 2:
            raise UserError("loop.fd_samples: a distance needs 2 validation images or more, there is 1; set it to 0")

    def moments(self, batches: Iterable[Tensor]) -> Moments:
        """Those of the features of images."""
        moments = Moments(self.network.num_features)
        for images in batches:
            moments.update(self.network(images))
        return moments

    def distance(self) -> float:
        """That of the samples of the generator as it is now."""
        labels = balanced_labels(self.num_samples, max(1, self.model.num_classes))
        images = sample(self.model, self.tokenizer, labels, batch_size=self.batch_size).images
        found = self.moments(images.split(self.batch_size))
        return frechet_distance(found.mean, found.cov, self.target.mean, self.target.cov)

    def keep(self, step: int, distance: float) -> None:
        """Keeps the generator as it is now, if it is the best so far."""
        record = self.folder / "best.json"
        # A record of a later step is left from before a resume: the run will come by there again.
        if record.exists():
            known = read_json(record)
            with reading(record, "the record of the best model", "remove it"):
                better = known["step"] < step and known["value"] <= distance
            if better:
                return
        save_generator(self.model, self.folder / "best", self.origin)
        write_json(record, {"step": step, "metric": METRIC, "value": distance})
