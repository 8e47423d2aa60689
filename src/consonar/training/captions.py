"""Captions as what a generator is conditioned on: its text encoder, and the features of a store's captions."""

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

import torch

from consonar.data.captions import NUMBERED, Called, CaptionFeatures, all_captions
from consonar.data.mixture import TokenStores
from consonar.data.sources import called_in
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.generators.base import GeneratorConfig
from consonar.networks.text_encoders import load_caption_reader, readers
from consonar.origin import Origin
from consonar.training.caption_rewards import check_captions
from consonar.training.config import TrainConfig
from consonar.types import ImageSource, TextEncoder

Progress = Callable[[int, int], None]
"""Gets how many captions of how many are read."""


def text_encoder_of(config: TrainConfig, shape: GeneratorConfig, device: torch.device) -> TextEncoder | None:
    """What reads the captions of a generator of this shape, on the device; None for one that takes classes.

    Raises `UserError` where none is named or one for nothing, and for one that does not fit.
    """
    name = config.text_encoder
    if shape.has_classes:
        if name is not None:
            raise UserError(f"text_encoder: {name!r} is read only for a generator of captions; remove it")
        return None
    if name is None:
        raise UserError(f"text_encoder: the generator takes captions; name what reads them: {readers(shape)}")
    return load_caption_reader(shape, name, device, fresh=config.init is None)


def caption_features(
    store: TokenStore | TokenStores, encoder: TextEncoder | None, progress: Progress
) -> CaptionFeatures | None:
    """Those of every item; None without an encoder. `UserError` where an item has no caption."""
    return None if encoder is None else features(store.captions, encoder, f"tokens: {str(store.path)!r}", progress)


def captions_of_pictures(
    source: ImageSource, encoder: TextEncoder | None, progress: Progress, rewards: Collection[str]
) -> CaptionFeatures | None:
    """Those of every picture, all of which are read where the source knows its captions no other way; None without an
    encoder. `UserError` where one has none, and where `rewards` cannot read one, which is told before any is encoded.
    """
    if encoder is None:
        check_captions(rewards, None, source.name)
        return None
    known: Iterable[str | None] | None = getattr(source, "captions", None)
    captions = (record.caption for record in source) if known is None else known
    return features(
        captions, encoder, f"data.images: {source.name}", progress, rewards, called=partial(called_in, source)
    )


def told(captions: CaptionFeatures | None, held_out: CaptionFeatures | None) -> tuple[str, ...]:
    """What a run says of its captions; of those held out only where some are cut."""
    of_held_out = (f"validation {held_out.about}",) if held_out and held_out.num_cut else ()
    return (captions.about, *of_held_out) if captions else of_held_out


def features(
    captions: Iterable[str | None],
    encoder: TextEncoder,
    where: str,
    progress: Progress,
    rewards: Collection[str] = (),
    called: Called = NUMBERED,
) -> CaptionFeatures:
    given = all_captions(captions, where, called=called)
    check_captions(rewards, given, where, called)
    return CaptionFeatures(given, encoder, where=where, progress=progress, called=called)


def read_by(
    origin: Origin,
    encoder: TextEncoder | None,
    name: str | None,
    captions: CaptionFeatures | None = None,
    held_out: CaptionFeatures | None = None,
) -> Origin:
    """The origin of what takes captions, which `encoder`, called `name`, reads; classes mean nothing to it.

    `captions` and `held_out`: those of its pictures, which the hashes of these leave out.
    """
    if encoder is None or name is None:
        return origin
    place = str(home_expanded(name).resolve()) if home_expanded(name).is_dir() else name
    return replace(
        origin, class_names=None, text_encoder=place, text_encoder_fingerprint=encoder.fingerprint,
        data_sha256=with_captions(origin.data_sha256, captions),
        validation_sha256=with_captions(origin.validation_sha256, held_out),
    )  # fmt: skip


def with_captions(content: str | None, captions: CaptionFeatures | None) -> str | None:
    """The hash of a content and its captions; None where one is not known."""
    if content is None or captions is None:
        return content
    return hashlib.sha256(f"{content} {captions.content}".encode()).hexdigest()
