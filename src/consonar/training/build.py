"""From a configuration to what the loop needs: data, trainee, objective, callbacks, and how the result is exported.

There are three kinds of run, see `RUNS`; which one a configuration means is in the row of its method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from consonar import precision
from consonar.components import load_generator, load_tokenizer, save_generator, save_tokenizer
from consonar.data.bad_images import BadImages
from consonar.data.loader import TokenBatches, image_batches
from consonar.data.sources import choices
from consonar.distributed import World
from consonar.errors import UserError
from consonar.generators import build_generator
from consonar.generators.base import GeneratorConfig
from consonar.networks.discriminator import save_discriminator
from consonar.origin import Origin
from consonar.records import to_device
from consonar.seeding import derive_seed, generator
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import Codebook, CodebookTokenizer
from consonar.training.best import METRIC, KeepBest, ValidationDistance
from consonar.training.config import TrainConfig
from consonar.training.inputs import (
    check_same_classes,
    held_out_batches,
    open_store,
    preview_reconstructions,
    preview_samples,
    stored_num_tokens,
)
from consonar.training.intervals import Callbacks
from consonar.training.loop import Batches
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.pictures import open_pictures
from consonar.training.start_model import check_start_classes, load_start, of_source, origin_of
from consonar.training.trainee import Trainee
from consonar.types import Generator, Objective

PROBE_IMAGES = 8
"""From how many images, drawn over all of them, the decoder's receptive field is measured."""
Value = TypeVar("Value")


@dataclass
class Built:
    """What `train` hands to the loop, and `export(trainee, run_folder)`, which writes the released component.

    `origin` is what the run is made of, `about` lines about the pictures and classes that it reads,
    `bad` what cannot be read of them.
    """

    trainee: Trainee | TokenizerTrainee
    objective: Objective[Any, Any]
    batches: Batches[object]
    callbacks: Callbacks
    export: Callable[[Any, Path], None]
    origin: Origin
    about: tuple[str, ...]
    bad: BadImages | None = None


def build(config: TrainConfig, world: World, batch_size: int, out: Path) -> Built:
    """Everything of a run whose `init` is resolved; `batch_size` is that of this process. Raises `UserError`."""
    return RUNS[config.run](config, world, batch_size, out)


def needed(value: Value | None, message: str) -> Value:
    """The value; `UserError` with the message where there is none."""
    if value is None:
        raise UserError(message)
    return value


def generator_run(config: TrainConfig, world: World, batch_size: int, out: Path) -> Built:
    """Training on tokens: plain AR and reAR, from random weights or from those of `init`."""
    name = needed(config.tokenizer, "tokenizer: a generator needs the name or folder of its tokenizer")
    tokenizer = load_tokenizer(name, num_tokens=stored_num_tokens(config.data.tokens)).to(world.device)
    store = open_store(config.data.tokens, "data.tokens", tokenizer, config.data.views)
    shape = shape_of(config).sized(store.vocab_size, store.num_tokens, max(1, store.num_classes), grid=tokenizer.grid)
    model = load_start(config.init, shape, tokenizer) if config.init else build_generator(shape)
    if not config.init:
        model.reset_parameters(generator(config.seed, "init"))
    check_takes_classes(model, config)
    check_start_classes(config, "data.tokens", store.origin)
    trainee = Trainee(model, config.objective.head_specs(model.num_layers, tokenizer.code_dim))
    trainee.reset_heads(generator(config.seed, "init_heads"))
    objective = method_of_config(config.objective).objective(
        config.objective, tokenizer, total_steps=config.loop.steps, seed=config.seed, world=world
    )
    batches = TokenBatches(store, batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    callbacks = Callbacks(preview=lambda model, path: preview_samples(model.generator, tokenizer, path))
    held_out = None
    if config.data.validation_tokens:
        held_out = open_store(config.data.validation_tokens, "data.validation_tokens", tokenizer)
        check_same_classes(store, held_out)
        validation = TokenBatches(held_out, batch_size=batch_size, seed=config.seed)
        callbacks.validate = lambda model: objective.validate(model, held_out_batches(validation, config, world))
    check_validates(config, callbacks)
    origin = origin_of(config, name, store.fingerprint, store.origin, held_out.origin if held_out else None)
    return Built(trainee, objective, batches, callbacks, export_generator(origin), origin, (store.describe(),))


def post_training_run(config: TrainConfig, world: World, batch_size: int, out: Path) -> Built:
    """Post-training on images: VA-pi and its controls, from the generator of `init`."""
    init = needed(config.init, "init: post-training starts from a trained generator; give its run or model folder")
    name = needed(config.tokenizer, f"tokenizer: {init} does not say which tokenizer it goes with; add --tokenizer")
    shape = shape_of(config)
    tokenizer = load_tokenizer(name, num_tokens=shape.num_tokens).to(world.device)
    images = needed(config.data.images, f"data.images: post-training needs the images themselves; choices: {choices()}")
    model = load_start(init, shape, tokenizer)
    pictures = open_pictures(config, tokenizer.image_size, out, must_validate=False)
    train_source, held_out = pictures.train, pictures.held_out
    check_takes_classes(model, config)
    check_start_classes(config, "data.images", of_source(train_source))
    # Where every class is dropped none is needed: the condition that all get is the null class, behind the others.
    missing = model.num_classes if config.objective.drops_all_classes else None
    batches = image_batches(
        train_source, tokenizer.image_size, num_classes=model.num_classes, missing=missing, flip=config.data.flip,
        batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
    )  # fmt: skip

    def probe() -> Tensor:
        return to_device(next(batches.ordered(PROBE_IMAGES, PROBE_IMAGES)), world.device).images

    objective = method_of_config(config.objective).objective(
        config.objective, tokenizer,
        load_generator(init).to(world.device) if config.objective.needs_prior else None,
        total_steps=config.loop.steps, seed=config.seed, world=world, probe=probe,
        autocast_dtype=precision.pick_precision(config.loop.precision, world.device),
    )  # fmt: skip
    callbacks = Callbacks(preview=lambda model, path: preview_samples(model.generator, tokenizer, path))
    origin = origin_of(
        config, name, tokenizer.fingerprint, of_source(train_source), of_source(held_out) if held_out else None
    )
    if config.loop.fd_samples and held_out is None:
        raise UserError(f"loop.fd_samples: {images} has no validation images to compare with; set it to 0")
    if held_out is not None:
        validation = image_batches(
            held_out, tokenizer.image_size, num_classes=model.num_classes, missing=missing, batch_size=batch_size,
            seed=config.seed,
        )  # fmt: skip
        distance = None
        if config.loop.fd_samples:
            distance = ValidationDistance(validation, tokenizer, config.loop.fd_samples, world.device)
            callbacks.keep_best = KeepBest(out / "best", origin)

        def validate(model: AlignmentTrainee) -> dict[str, float]:
            values = objective.validate(model, held_out_batches(validation, config, world))
            return values | ({METRIC: distance(model.generator)} if distance else {})

        callbacks.validate = validate
    check_validates(config, callbacks)
    return Built(
        AlignmentTrainee(model), objective, batches, callbacks, export_generator(origin), origin, pictures.about,
        pictures.bad,
    )  # fmt: skip


def tokenizer_run(config: TrainConfig, world: World, batch_size: int, out: Path) -> Built:
    """Training a tokenizer on images."""
    shape = needed(config.model, "model: a tokenizer is trained from its shape")
    needed(config.data.images, f"data.images: a tokenizer needs an image source; choices: {choices()}")
    tokenizer = TOKENIZERS[shape.kind].model(shape, name=out.absolute().name)
    if not isinstance(tokenizer, CodebookTokenizer):
        raise UserError(f"model.kind: {shape.kind!r} has no codebook to train")
    size = tokenizer.image_size
    pictures = open_pictures(config, size, out, must_validate=True)
    held_out = needed(pictures.held_out, "data.validation_split: there is none, and a tokenizer is validated")
    trainee = TokenizerTrainee(tokenizer, discriminator=config.objective.has_discriminator)
    reset_trainee(trainee, config.seed)
    objective = method_of_config(config.objective).objective(
        config.objective, total_steps=config.loop.steps, seed=config.seed, world=world
    )
    batches = image_batches(
        pictures.train, size, flip=config.data.flip, batch_size=batch_size, seed=config.seed, rank=world.rank,
        world_size=world.size,
    )  # fmt: skip
    validation = image_batches(held_out, size, batch_size=batch_size, seed=config.seed)
    callbacks = Callbacks(
        validate=lambda model: objective.validate(model, held_out_batches(validation, config, world)),
        preview=lambda model, path: preview_reconstructions(model.tokenizer, validation, world, path),
    )
    origin = replace(of_source(pictures.train), validation_sha256=of_source(held_out).data_sha256)
    return Built(trainee, objective, batches, callbacks, export_tokenizer, origin, pictures.about, pictures.bad)


RUNS: dict[str, Callable[[TrainConfig, World, int, Path], Built]] = {
    "generator": generator_run,
    "post-training": post_training_run,
    "tokenizer": tokenizer_run,
}


def shape_of(config: TrainConfig) -> GeneratorConfig:
    """The shape of the generator; `UserError` where it is that of something else."""
    if isinstance(config.model, GeneratorConfig):
        return config.model
    raise UserError("model: none is given, and there is no init to take it from")


def check_validates(config: TrainConfig, callbacks: Callbacks) -> None:
    """Raises `UserError` where a part of the held-out items is asked for and there are none."""
    if config.data.validation_items and not callbacks.validate:
        raise UserError(
            f"data.validation_items: {config.data.validation_items} is read only with data for validation, and there "
            "are none; set it to 0"
        )


def check_takes_classes(model: Generator, config: TrainConfig) -> None:
    """Raises `UserError` for a generator that is conditioned on text: token stores and image sources give classes."""
    if model.num_classes == 0:
        raise UserError(
            f"model.kind: {config.model.kind if config.model else ''!r} is conditioned on text, and `train` reads "
            "classes; use the objectives with your own batches of TextCondition or PromptCondition"
        )


def export_generator(origin: Origin) -> Callable[[Trainee, Path], None]:
    """Writes the generator of a trainee, of this origin, to model/."""
    return lambda trainee, out: save_generator(trainee.generator, out / "model", origin)


def export_tokenizer(trainee: TokenizerTrainee, out: Path) -> None:
    """The tokenizer in model/, and the discriminator that it was trained against in discriminator/."""
    save_tokenizer(trainee.tokenizer, out / "model")
    if trainee.discriminator is not None:
        save_discriminator(trainee.discriminator, out / "discriminator")


@torch.no_grad()
def reset_trainee(trainee: TokenizerTrainee, seed: int) -> None:
    """The layers' default initialisation, drawn from the run's seed whatever was drawn before; codes within 1 of 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        for module in trainee.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        for module in trainee.modules():
            if isinstance(module, Codebook):
                module.embedding.weight.uniform_(-1, 1)
