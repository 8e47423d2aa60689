"""The pictures of a run: what is trained on, what is held out for validation, and what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consonar.components import read_origin
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.image_folder import other_files
from consonar.data.labels import describe
from consonar.data.sources import Part, open_source
from consonar.errors import MissingSplit, UserError
from consonar.seeding import generator, permutation
from consonar.training.config import TrainConfig
from consonar.types import ImageSource, IndexedSource

HELD_OUT = 0.05
"""Share of the training pictures that a tokenizer is validated on where the data have no split for it."""


@dataclass(frozen=True)
class Pictures:
    """The sources of a run, with lines that say what they are, and what cannot be read of them."""

    train: ImageSource
    held_out: ImageSource | None
    about: tuple[str, ...]
    bad: BadImages


def open_pictures(config: TrainConfig, image_size: int, run: Path, *, must_validate: bool) -> Pictures:
    """The pictures of `config.data`; `run` is the folder where an earlier part of the run has listed bad ones.

    Both splits are opened before a picture is decoded. `must_validate`: where the data have no split `validation`, a
    part of the training pictures is held out, drawn by the run's seed. Raises `UserError` as `open_source`, `hold_out`
    and `leave_out` do.
    """
    train, held_out, share = open_images(config, "train", image_size), None, None
    wanted = config.data.validation_split
    if wanted and wanted.endswith("%"):
        share = float(wanted.removesuffix("%")) / 100  # its form is checked by the configuration
    elif wanted:
        held_out = open_images(config, wanted, image_size)
    else:
        try:
            held_out = open_images(config, "validation", image_size)
        except MissingSplit as error:
            share = HELD_OUT if must_validate else None
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
    assert data.images is not None  # asked for only where a run has them
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
