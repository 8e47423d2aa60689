"""From a configuration to what the loop needs: data, trainee, objective, callbacks, and how the result is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from consonar import distributed
from consonar.config import TrainConfig
from consonar.data.bad_images import BadImages
from consonar.data.loader import TokenBatches
from consonar.distributed import World
from consonar.errors import UserError
from consonar.generators import build_generator, load_generator, save_generator
from consonar.origin import Origin
from consonar.placement import to_device
from consonar.seeding import derive_seed, generator
from consonar.tokenizers import load_tokenizer, save_tokenizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training.alignment import AlignmentConfig, AlignmentTrainee
from consonar.training.baselines import (
    CrossEntropyAlignment,
    CrossEntropyConfig,
    StraightThrough,
    StraightThroughConfig,
)
from consonar.training.best import METRIC, KeepBest, ValidationDistance
from consonar.training.discriminator import save_discriminator
from consonar.training.inputs import (
    check_classes,
    held_out_batches,
    image_batches,
    open_store,
    preview_reconstructions,
    preview_samples,
    stored_num_tokens,
)
from consonar.training.loop import Batches, Callbacks
from consonar.training.objectives import Consistency, ConsistencyConfig
from consonar.training.pictures import open_pictures
from consonar.training.policy_objective import PolicyAlignment, PolicyConfig
from consonar.training.start import check_start_classes, load_start, of_source, origin_of
from consonar.training.trainee import Trainee
from consonar.training.vq_objective import Reconstruction, ReconstructionConfig, TokenizerTrainee
from consonar.types import Objective

ALIGNMENTS: dict[type, Callable[..., Any]] = {
    PolicyConfig: PolicyAlignment,
    CrossEntropyConfig: CrossEntropyAlignment,
    StraightThroughConfig: StraightThrough,
}
PROBE_IMAGES = 8
"""From how many images, drawn over all of them, the decoder's receptive field is measured."""


@dataclass
class Made:
    """What `train` hands to the loop, and `export(trainee, run_folder)`, which writes the released component.

    `origin` is what the run is made of, `about` lines about the pictures and classes that it reads,
    `bad` what cannot be read of them.
    """

    trainee: nn.Module
    objective: Objective
    batches: Batches
    callbacks: Callbacks
    export: Callable[[Any, Path], None]
    origin: Origin
    about: tuple[str, ...]
    bad: BadImages | None = None


def build(config: TrainConfig, world: World, batch_size: int, out: Path) -> Made:
    """Everything of a run whose `init` is resolved; `batch_size` is that of this process. Raises `UserError`."""
    if isinstance(config.model, VQConfig):
        return build_tokenizer_run(config, world, batch_size, out)
    if config.aligns:
        return build_alignment_run(config, world, batch_size, out)
    return build_generator_run(config, world, batch_size)


def build_generator_run(config: TrainConfig, world: World, batch_size: int) -> Made:
    """Training on tokens: plain AR and reAR, from random weights or from those of `init`."""
    assert isinstance(config.objective, ConsistencyConfig) and config.tokenizer and config.model
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=stored_num_tokens(config.data.tokens)).to(world.device)
    store = open_store(config.data.tokens, "data.tokens", tokenizer, config.data.views)
    shape = cast(Any, config.model).sized(
        store.vocab_size, store.num_tokens, max(1, store.num_classes), grid=tokenizer.grid
    )
    model = load_start(config, shape, tokenizer) if config.init else build_generator(shape)
    if not config.init:
        model.reset_parameters(generator(config.seed, "init"))
    check_takes_classes(model, config)
    check_start_classes(config, "data.tokens", store.origin)
    trainee = Trainee(model, config.objective.head_specs(model.num_layers, tokenizer.code_dim))
    trainee.reset_heads(generator(config.seed, "init_heads"))
    objective = Consistency(
        config.objective, tokenizer, total_steps=config.loop.steps, seed=config.seed,
        rank=world.rank, world_size=world.size,
    )  # fmt: skip
    batches = TokenBatches(store, batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    callbacks = Callbacks(preview=lambda model, path: preview_samples(model.generator, tokenizer, path))
    held_out = None
    if config.data.validation_tokens:
        held_out = open_store(config.data.validation_tokens, "data.validation_tokens", tokenizer)
        check_classes(store, held_out)
        validation = TokenBatches(held_out, batch_size=batch_size, seed=config.seed)
        callbacks.validate = lambda model: objective.validate(model, held_out_batches(validation, config, world))
    check_validates(config, callbacks)
    origin = origin_of(config, store.fingerprint, store.origin, held_out.origin if held_out else None)
    return Made(
        trainee, objective, batches, callbacks,
        lambda trainee, out: save_generator(trainee.generator, out / "model", origin),
        origin, (store.describe(),),
    )  # fmt: skip


def build_alignment_run(config: TrainConfig, world: World, batch_size: int, out: Path) -> Made:
    """Post-training on images: VA-pi and its controls, from the generator of `init`."""
    assert isinstance(config.objective, AlignmentConfig) and config.tokenizer and config.model and config.init
    num_tokens = cast(Any, config.model).num_tokens
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=num_tokens).to(world.device)
    if not config.data.images:
        raise UserError(
            "data.images: post-training needs the images themselves; "
            "choices: openmoji, a folder, imagefolder:PATH, hf:owner/name"
        )
    model = load_start(config, config.model, tokenizer)
    pictures = open_pictures(config, tokenizer.image_size, out, must_validate=False)
    train_source, held_out = pictures.train, pictures.held_out
    check_takes_classes(model, config)
    check_start_classes(config, "data.images", of_source(train_source))
    rank = {"rank": world.rank, "world_size": world.size}
    # Where every class is dropped none is needed: the condition that all get is the null class, behind the others.
    missing = model.num_classes if config.objective.class_dropout == 1 else None
    labels: dict[str, Any] = {"num_classes": model.num_classes, "missing": missing}
    batches = image_batches(
        config, train_source, tokenizer.image_size, batch_size, flip=config.data.flip, **labels, **rank
    )
    prior = load_generator(config.init).to(world.device) if config.objective.needs_prior else None
    settings: dict[str, Any] = {
        "total_steps": config.loop.steps, "seed": config.seed, "world": world,
        "autocast_dtype": distributed.pick_precision(config.loop.precision, world.device),
    }  # fmt: skip
    if isinstance(config.objective, PolicyConfig) and config.objective.smooth_credit:
        probe = next(batches.ordered(PROBE_IMAGES, PROBE_IMAGES))
        settings["probe"] = to_device(probe, world.device).images
    objective = ALIGNMENTS[type(config.objective)](config.objective, tokenizer, prior, **settings)
    callbacks = Callbacks(preview=lambda model, path: preview_samples(model.generator, tokenizer, path))
    origin = origin_of(
        config, tokenizer.fingerprint, of_source(train_source), of_source(held_out) if held_out else None
    )
    if config.loop.fd_samples and held_out is None:
        raise UserError(f"loop.fd_samples: {config.data.images} has no validation images to compare with; set it to 0")
    if held_out is not None:
        validation = image_batches(config, held_out, tokenizer.image_size, batch_size, **labels)
        distance = None
        if config.loop.fd_samples:
            distance = ValidationDistance(validation, tokenizer, config.loop.fd_samples, world.device)
            callbacks.keep_best = KeepBest(out / "best", origin)

        def validate(model: Any) -> dict[str, float]:
            values = objective.validate(model, held_out_batches(validation, config, world))
            return values | ({METRIC: distance(model.generator)} if distance else {})

        callbacks.validate = validate
    check_validates(config, callbacks)
    return Made(
        AlignmentTrainee(model), objective, batches, callbacks,
        lambda trainee, out: save_generator(trainee.generator, out / "model", origin),
        origin, pictures.about, pictures.bad,
    )  # fmt: skip


def check_validates(config: TrainConfig, callbacks: Callbacks) -> None:
    """Raises `UserError` where a part of the held-out items is asked for and there are none."""
    if config.data.validation_items and not callbacks.validate:
        raise UserError(
            f"data.validation_items: {config.data.validation_items} is read only with data for validation, and there "
            "are none; set it to 0"
        )


def check_takes_classes(model: Any, config: TrainConfig) -> None:
    """Raises `UserError` for a generator that is conditioned on text: token stores and image sources give classes."""
    if model.num_classes == 0:
        raise UserError(
            f"model.kind: {config.model.kind if config.model else ''!r} is conditioned on text, and `train` reads "
            "classes; use the objectives with your own batches of TextCondition or PromptCondition"
        )


def build_tokenizer_run(config: TrainConfig, world: World, batch_size: int, out: Path) -> Made:
    """Training a tokenizer on images."""
    assert isinstance(config.model, VQConfig) and isinstance(config.objective, ReconstructionConfig)
    if not config.data.images:
        raise UserError(
            "data.images: a tokenizer needs an image source; "
            "choices: openmoji, a folder, imagefolder:PATH, hf:owner/name"
        )
    size = config.model.image_size
    pictures = open_pictures(config, size, out, must_validate=True)
    source, held_out = pictures.train, pictures.held_out
    assert held_out is not None
    tokenizer = VQTokenizer(config.model, name=config.recipe.removeprefix("tokenizer-"))
    trainee = TokenizerTrainee(tokenizer, discriminator=config.objective.discriminator_weight > 0)
    reset_trainee(trainee, config.seed)
    objective = Reconstruction(config.objective, total_steps=config.loop.steps, seed=config.seed, world=world)
    rank = {"rank": world.rank, "world_size": world.size}
    batches = image_batches(config, source, size, batch_size, flip=config.data.flip, **rank)
    validation = image_batches(config, held_out, size, batch_size)
    callbacks = Callbacks(
        validate=lambda model: objective.validate(model, held_out_batches(validation, config, world)),
        preview=lambda model, path: preview_reconstructions(model.tokenizer, validation, world, path),
    )
    origin = replace(of_source(source), validation_sha256=of_source(held_out).data_sha256)
    return Made(
        trainee, objective, batches, callbacks, export_tokenizer, origin, pictures.about, pictures.bad
    )  # fmt: skip


def export_tokenizer(trainee: TokenizerTrainee, out: Path) -> None:
    """The tokenizer in model/, and the discriminator that it was trained against in discriminator/."""
    save_tokenizer(trainee.tokenizer, out / "model")
    if trainee.discriminator is not None:
        save_discriminator(trainee.discriminator, out / "discriminator")


@torch.no_grad()
def reset_trainee(trainee: TokenizerTrainee, seed: int) -> None:
    """The layers' default initialisation, drawn from the run's seed whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        for module in trainee.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        trainee.tokenizer.quantize.embedding.weight.uniform_(-1, 1)
