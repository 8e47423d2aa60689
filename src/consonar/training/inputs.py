"""What runs read: token stores, images, and pictures of what a trainee makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from consonar.data.loader import Batches, PictureBatches
from consonar.data.picture_files import save_grid
from consonar.data.tokens import TokenStore
from consonar.distributed import World
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.origin import check
from consonar.records import to_device
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import SamplerConfig, sample
from consonar.training.config import TrainConfig
from consonar.types import Generator, Tokenizer

Item = TypeVar("Item")


PREVIEW_IMAGES = 16


def stored_num_tokens(path: str | None) -> int | None:
    """Tokens per image of the store at `path`; None where there is none (`open_store` then says so)."""
    return TokenStore.open(path).num_tokens if path and home_expanded(path).exists() else None


def open_store(path: str | None, key: str, tokenizer: Tokenizer, views: str | None = None) -> TokenStore:
    """A token store made with this tokenizer, and of these views, or a `UserError` that says how to make one."""
    command = f"consonar tokenize --tokenizer {tokenizer.name}{f' --views {views}' if views else ''}"
    if not path:
        raise UserError(f"{key}: no token store given; make one with: {command} --data ... --out DIR")
    if not home_expanded(path).exists():
        split = " --split validation" if "validation" in key else ""
        raise UserError(f"{key}: no token store at {path}; make it with: {command} --data openmoji{split} --out {path}")
    store = TokenStore.open(path)
    if views not in (None, store.metadata.views):
        held = store.metadata.views
        raise UserError(f"{key}: {path} holds the views {held}, data.views is {views}; make one with: {command} ...")
    store.check_tokenizer(tokenizer)
    store.check_content()
    return store


def check_same_classes(store: TokenStore, held_out: TokenStore) -> None:
    """Raises `UserError` unless label i means the same in both stores, and training has every label of validation."""
    where, remedy = f"data.validation_tokens: {held_out.path}", "tokenize both as splits of one data set"
    check(where, held_out.origin, store.origin, str(store.path), remedy)
    several = held_out.num_classes > store.num_classes or bool(held_out.num_classes) != bool(store.num_classes)
    if several or (held_out.class_names is None) != (store.class_names is None):
        ours, theirs = (
            f"{s.num_classes} classes{'' if s.class_names else ' without names'}" if s.num_classes else "no classes"
            for s in (held_out, store)
        )
        raise UserError(f"{where} has {ours}, {store.path} has {theirs}; {remedy}")


def held_out_batches(batches: Batches[Item], config: TrainConfig, world: World) -> Iterator[Item]:
    """What a validation measures, on the device."""
    for batch in batches.ordered(batches.batch_size, config.data.validation_items):
        yield to_device(batch, world.device)


def preview_samples(model: Generator, tokenizer: Tokenizer, path: Path) -> None:
    labels = balanced_labels(PREVIEW_IMAGES, max(1, model.num_classes))
    result = sample(model, tokenizer, labels, seeds=range(PREVIEW_IMAGES), config=SamplerConfig())
    save_grid(result.images, path, columns=8)


def preview_reconstructions(tokenizer: Tokenizer, validation: PictureBatches, world: World, path: Path) -> None:
    rows = torch.linspace(0, validation.num_items - 1, min(PREVIEW_IMAGES, validation.num_items)).long()
    images = to_device(validation.read(rows), world.device).images
    pairs = torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)
    save_grid(pairs, path, columns=8)
