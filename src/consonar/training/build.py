"""From a configuration to what the loop needs: data, trainee, objective.

There are three kinds of run, see `RUNS`; which one a configuration means is in the row of its method.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consonar import precision
from consonar.components import load_generator, load_tokenizer
from consonar.data.loader import Place, TokenBatches, image_batches
from consonar.distributed import World
from consonar.errors import UserError
from consonar.generators import build_generator
from consonar.generators.base import GeneratorConfig
from consonar.records import to_device
from consonar.seeding import derive_seed, generator
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import Codebook, CodebookTokenizer
from consonar.training import inputs
from consonar.training.config import TrainConfig
from consonar.training.loop import Built
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.origins import load_start, origin_of
from consonar.training.trainee import Trainee
from consonar.types import Generator, Objective, Tokenizer

PROBE_IMAGES = 8
"""From how many images, drawn over all of them, the decoder's receptive field is measured."""


def build(config: TrainConfig, world: World, batch_size: int, out: Path) -> Built:
    """All of a run that `resolve_start` has completed; `batch_size` is that of this process. Raises `UserError`."""
    place = Place(batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    built = RUNS[config.run](config, world, place, out)
    if config.data.validation_items and built.held_out is None:
        raise UserError(
            f"data.validation_items: {config.data.validation_items} is read only with data for validation, and there "
            "are none; set it to 0"
        )
    return built


def generator_run(config: TrainConfig, world: World, place: Place, out: Path) -> Built:
    """Training on tokens: plain AR and reAR, from random weights or from those of `init`."""
    data, shape = config.data, config.model
    assert isinstance(shape, GeneratorConfig) and config.tokenizer is not None  # `resolve_start`
    store = inputs.open_store(data.tokens, "data.tokens", config.tokenizer, data.views)
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=store.num_tokens).to(world.device)
    store.check_tokenizer(tokenizer)
    shape = shape.sized(store.vocab_size, store.num_tokens, max(1, store.num_classes), grid=tokenizer.grid)
    model = start_of(config, shape, tokenizer)
    trainee = Trainee(model, config.objective.head_specs(model.num_layers, tokenizer.code_dim))
    trainee.reset_heads(generator(config.seed, "init_heads"))
    objective = make_objective(config, world, tokenizer)
    built = Built(trainee, objective, TokenBatches(store, **place), about=(store.describe(),))
    built.preview = lambda model, path: inputs.preview_samples(model.generator, tokenizer, path)
    origin = store.origin
    if data.validation_tokens:
        held_out = inputs.open_held_out(data.validation_tokens, config.tokenizer, store)
        held_out.check_tokenizer(tokenizer)
        built.held_out = TokenBatches(held_out, **place)
        origin = replace(origin, validation_sha256=held_out.origin.data_sha256)
    built.origin = origin_of(config, f"data.tokens: {data.tokens}", store.fingerprint, origin)
    return built


def post_training_run(config: TrainConfig, world: World, place: Place, out: Path) -> Built:
    """Post-training on images: VA-pi and its controls, from the generator of `init`."""
    data, shape, init = config.data, config.model, config.init
    # `resolve_start`
    assert isinstance(shape, GeneratorConfig) and config.tokenizer is not None and init is not None
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=shape.num_tokens).to(world.device)
    model = start_of(config, shape, tokenizer)
    pictures = inputs.open_pictures(config, tokenizer.image_size, out)
    origin = origin_of(config, f"data.images: {data.images}", tokenizer.fingerprint, pictures.origin)
    # Where every class is dropped none is needed: the condition that all get is the null class, behind the others.
    missing = model.num_classes if config.objective.drops_all_classes else None
    made = partial(image_batches, image_size=tokenizer.image_size, num_classes=model.num_classes, missing=missing)
    batches = made(pictures.train, flip=data.flip, **place)

    def probe() -> Tensor:
        return to_device(next(batches.ordered(PROBE_IMAGES, PROBE_IMAGES)), world.device).images

    prior = load_generator(init).to(world.device) if config.objective.needs_prior else None
    dtype = precision.pick_precision(config.loop.precision, world.device)
    objective = make_objective(config, world, tokenizer, prior, probe=probe, autocast_dtype=dtype)
    built = Built(AlignmentTrainee(model), objective, batches, origin=origin, about=pictures.about, bad=pictures.bad)
    built.preview = lambda model, path: inputs.preview_samples(model.generator, tokenizer, path)
    if config.loop.fd_samples and pictures.held_out is None:
        raise UserError(f"loop.fd_samples: {data.images} has no validation images to compare with; set it to 0")
    if pictures.held_out is not None:
        built.held_out = validation = made(pictures.held_out, **place)
        if config.loop.fd_samples:
            built.best = inputs.KeepBest(model, validation, tokenizer, config.loop.fd_samples, out, origin)
    return built


def tokenizer_run(config: TrainConfig, world: World, place: Place, out: Path) -> Built:
    """Training a tokenizer on images."""
    shape = config.model
    assert shape is not None  # its configuration is not valid without
    tokenizer = TOKENIZERS[shape.kind].model(shape, name=out.absolute().name)
    if not isinstance(tokenizer, CodebookTokenizer):
        raise UserError(f"model.kind: {shape.kind!r} has no codebook to train")
    pictures = inputs.open_pictures(config, tokenizer.image_size, out)
    assert pictures.held_out is not None  # `open_pictures` holds some out
    trainee = TokenizerTrainee(tokenizer, discriminator=config.objective.has_discriminator)
    reset_trainee(trainee, config.seed)
    objective = make_objective(config, world)
    batches = image_batches(pictures.train, tokenizer.image_size, flip=config.data.flip, **place)
    validation = image_batches(pictures.held_out, tokenizer.image_size, **place)
    origin, about, bad = pictures.origin, pictures.about, pictures.bad
    built = Built(trainee, objective, batches, validation, origin=origin, about=about, bad=bad)
    built.preview = lambda model, path: inputs.preview_reconstructions(model.tokenizer, validation, world, path)
    return built


RUNS: dict[str, Callable[[TrainConfig, World, Place, Path], Built]] = {
    "generator": generator_run,
    "post-training": post_training_run,
    "tokenizer": tokenizer_run,
}


def make_objective(config: TrainConfig, world: World, *models: object, **settings: object) -> Objective[Any, Any]:
    """The objective of the run's method, from what its kind of run gives beside what all do."""
    objective: Objective[Any, Any] = method_of_config(config.objective).objective(
        config.objective, *models, total_steps=config.loop.steps, seed=config.seed, world=world, **settings
    )
    return objective


def start_of(config: TrainConfig, shape: GeneratorConfig, tokenizer: Tokenizer) -> Generator:
    """The generator to train, of `init` or with random weights; `UserError` for one that is conditioned on text."""
    model = load_start(config.init, shape, tokenizer) if config.init else build_generator(shape)
    if not config.init:
        model.reset_parameters(generator(config.seed, "init"))
    if model.num_classes == 0:
        raise UserError(
            f"model.kind: {shape.kind!r} is conditioned on text, and `train` reads classes; use the objectives with "
            "your own batches of TextCondition or PromptCondition"
        )
    return model


@torch.no_grad()
def reset_trainee(trainee: TokenizerTrainee, seed: int) -> None:
    """The layers' default initialisation, drawn from the run's seed whatever was drawn before; codes within 1 of 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        for module in trainee.modules():
            if (reset := getattr(module, "reset_parameters", None)) is not None:
                reset()
        for module in trainee.modules():
            if isinstance(module, Codebook):
                module.embedding.weight.uniform_(-1, 1)
