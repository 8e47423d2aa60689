"""From a configuration to what the loop needs: token stores or pictures, what is held out of them, trainee, objective.

There are three kinds of run, see `RUNS`; which one a configuration means is in the row of its method.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consonar import parallel
from consonar.components import load_generator, load_tokenizer, read_origin
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.captions import CaptionFeatures
from consonar.data.image_folder import other_files
from consonar.data.labels import describe
from consonar.data.loader import ImageBatches, Place, TokenBatches, image_batches
from consonar.data.mixture import TokenStores, as_one, store_paths
from consonar.data.picture_files import save_grid
from consonar.data.sources import check_mirrored, choices, named_after
from consonar.data.splits import open_splits
from consonar.data.tokens import TokenStore
from consonar.distributed import World
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.generators.base import GeneratorConfig
from consonar.origin import Origin, check
from consonar.precision import autocast_type
from consonar.records import to_device
from consonar.sampling.job import balanced_labels
from consonar.sampling.sample import sample
from consonar.seeding import derive_seed, draw_weights, generator
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import Codebook
from consonar.training.best import BEST_BY, METRIC, DistanceToHeldOut, KeepBest
from consonar.training.captions import Progress, caption_features, captions_of_pictures, read_by, text_encoder_of, told
from consonar.training.config import TrainConfig
from consonar.training.loop import Built
from consonar.training.lora import StartModel, adapt
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentConfig, AlignmentTrainee
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.origins import load_start, origin_of, random_start, start_tokenizer, with_heads
from consonar.training.trainee import Trainee
from consonar.types import Condition, Generator, ImageSource, Objective, Tokenizer

PREVIEW_IMAGES = 16
PROBE_IMAGES = 8
"""From how many images, drawn over all of them, the decoder's receptive field is measured."""


def build(config: TrainConfig, world: World, batch_size: int, out: Path, progress: Progress) -> Built:
    """All of a run that `resolve_start` has completed; `batch_size` is that of this process. Raises `UserError`."""
    place = Place(batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    built = RUNS[config.run](config, world, place, out, progress)
    if built.held_out is None and config.data.validation_items:
        built.about += (f"no data for validation: data.validation_items {config.data.validation_items} is not read",)
    if built.held_out is None and config.loop.keep_best:
        raise UserError("loop.keep_best: True is read only with data for validation, and there are none; remove it")
    if config.loop.keep_best or built.distance:
        of = built.distance.protocol if built.distance else None
        built.best = KeepBest(BEST_BY[config.run], out, built.origin, of)
    return built


def generator_run(config: TrainConfig, world: World, place: Place, out: Path, progress: Progress) -> Built:
    """Training on tokens: plain AR and reAR, from random weights or from those of `init`."""
    data, shape = config.data, config.model
    assert isinstance(shape, GeneratorConfig) and config.tokenizer is not None  # `resolve_start`
    store = open_store(data.tokens, "data.tokens", config.tokenizer, data.views)
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=store.num_tokens).to(world.device)
    store.check_tokenizer(tokenizer)
    shape = shape.sized(store.vocab_size, store.num_tokens, max(1, store.num_classes), grid=tokenizer.grid)
    model = start_of(config, shape, tokenizer, world.device)
    trainee = Trainee(model, config.objective.head_specs(model.num_layers, tokenizer.code_dim))
    draw_weights(trainee.heads, rng=generator(config.seed, "init_heads"))  # of their own: they never move its start
    objective = make_objective(config, world, tokenizer)
    encoder = text_encoder_of(config, shape, world.device)
    origin = read_by(store.origin, encoder, config.text_encoder)
    batches = TokenBatches(store, data.weights, caption_features(store, encoder, progress), **place)
    built, shown = Built(trainee, objective, batches), batches
    if data.validation_tokens:
        held_out = open_held_out(data.validation_tokens, config.tokenizer, store)
        held_out.check_tokenizer(tokenizer)
        built.held_out = shown = TokenBatches(held_out, captions=caption_features(held_out, encoder, progress), **place)
        origin = replace(origin, validation_sha256=held_out.origin.data_sha256)
    built.about = (store.describe(), *told(batches.captions, shown.captions if built.held_out else None))
    built.preview = lambda model, path: preview_samples(model.generator, tokenizer, path, shown.captions)
    built.origin = origin_of(config, f"data.tokens: {data.tokens}", store.fingerprint, origin)
    return built


def post_training_run(config: TrainConfig, world: World, place: Place, out: Path, progress: Progress) -> Built:
    """Post-training on images: VA-pi and its controls, from the generator of `init`."""
    data, shape, init, settings = config.data, config.model, config.init, config.objective
    assert isinstance(shape, GeneratorConfig) and isinstance(settings, AlignmentConfig)  # `resolve_start`, `METHODS`
    assert config.tokenizer is not None and init is not None
    tokenizer = load_tokenizer(config.tokenizer, num_tokens=shape.num_tokens).to(world.device)
    model = start_of(config, shape, tokenizer, world.device)
    encoder = text_encoder_of(config, shape, world.device)
    pictures = open_pictures(config, tokenizer.image_size, out)
    settings.check_guard(validated=pictures.held_out is not None)
    read = partial(captions_of_pictures, encoder=encoder, progress=progress, rewards=settings.rewards)
    shown, held_out = read(pictures.train), read(pictures.held_out) if pictures.held_out else None
    origin = read_by(pictures.origin, encoder, config.text_encoder, shown, held_out)
    origin = origin_of(config, f"data.images: {data.images}", tokenizer.fingerprint, origin)
    # Where every class is dropped none is needed: the condition that all get is the null class, behind the others.
    missing = model.num_classes if settings.drops_all_classes else None
    classes = None if encoder else model.num_classes
    made = partial(image_batches, image_size=tokenizer.image_size, num_classes=classes, missing=missing)
    batches = made(pictures.train, flip=data.flip, captions=shown, **place)

    def probe() -> Tensor:
        return to_device(next(batches.ordered(PROBE_IMAGES, PROBE_IMAGES)), world.device).images

    dtype = autocast_type(config.loop.multiplied_in(world))
    trainee = with_heads(init, model, tokenizer) if settings.keeps_heads else AlignmentTrainee(model)
    needed, inside = settings.needs_prior(validated=pictures.held_out is not None), config.lora.rank > 0
    prior: Generator | StartModel | None = StartModel(trainee) if needed and inside else None
    if needed and not inside:
        prior = load_generator(init)
        parallel.shard(prior, prior.blocks, config.parallel, world)  # type: ignore[arg-type]  # a module, too
        prior = prior.to(world.device)
    objective = make_objective(config, world, tokenizer, prior, probe=probe, autocast_dtype=dtype)
    built = Built(trainee, objective, batches, origin=origin, bad=pictures.bad)
    built.about = (*pictures.about, *told(shown, held_out), *objective.about)
    built.preview = lambda model, path: preview_samples(model.generator, tokenizer, path, held_out or shown)
    if config.loop.fd_samples and pictures.held_out is None:
        raise UserError(f"loop.fd_samples: {data.images} has no validation images to compare with; set it to 0")
    if pictures.held_out is not None:
        built.held_out = validation = made(pictures.held_out, captions=held_out, **place)
        if config.loop.fd_samples:
            built.distance = DistanceToHeldOut(validation, pictures.held_out.name, tokenizer, config.loop.fd_samples)
            built.about += (f"{METRIC}: {built.distance.protocol}",)
    return built


def tokenizer_run(config: TrainConfig, world: World, place: Place, out: Path, progress: Progress) -> Built:
    shape = config.model
    assert shape is not None  # its configuration is not valid without
    tokenizer = TOKENIZERS[shape.kind].model(shape, name=out.absolute().name)
    pictures = open_pictures(config, tokenizer.image_size, out)
    assert pictures.held_out is not None  # `open_pictures` holds some out
    has_discriminator, every = config.objective.has_discriminator, config.loop.activation_checkpointing
    trainee = TokenizerTrainee(tokenizer, discriminator=has_discriminator, recompute_every=every)
    reset_trainee(trainee, config.seed)
    objective = make_objective(config, world)
    batches = image_batches(pictures.train, tokenizer.image_size, flip=config.data.flip, **place)
    validation = image_batches(pictures.held_out, tokenizer.image_size, **place)
    origin = start_tokenizer(config.init, tokenizer, pictures.origin)
    built = Built(trainee, objective, batches, validation, origin=origin, about=pictures.about, bad=pictures.bad)
    built.preview = lambda model, path: preview_reconstructions(model.tokenizer, validation, world, path)
    return built


RUNS: dict[str, Callable[[TrainConfig, World, Place, Path, Progress], Built]] = {
    "generator": generator_run,
    "post-training": post_training_run,
    "tokenizer": tokenizer_run,
}


def make_objective(config: TrainConfig, world: World, *models: object, **settings: object) -> Objective[Any, Any]:
    """The objective of the run's method, from what its kind of run gives beside what all do."""
    return method_of_config(config.objective).objective(
        config.objective, *models, total_steps=config.loop.steps, seed=config.seed, world=world, **settings
    )


def start_of(config: TrainConfig, shape: GeneratorConfig, tokenizer: Tokenizer, device: torch.device) -> Generator:
    """The generator to train, of `init` or with random weights; `device`: the tokenizer's."""
    given = shape, tokenizer
    model = load_start(config.init, *given) if config.init else random_start(config.seed, *given, device)
    model.recompute_every = config.loop.activation_checkpointing
    adapt(model, config.lora, config.seed)
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


def open_store(words: str | None, key: str, tokenizer: str, views: str | None = None) -> TokenStore | TokenStores:
    """A whole token store, or several as one, and of these views, or a `UserError` that says how to make one with the
    tokenizer."""
    command = f"consonar tokenize --tokenizer {tokenizer}{f' --views {views}' if views else ''}"
    if not words:
        raise UserError(f"{key}: no token store given; make one with: {command} --data ... --out DIR")
    stores = []
    for path in store_paths(words):
        if not home_expanded(path).exists():
            split = " --split validation" if "validation" in key else ""
            made = f"{command} --data {named_after(path)}{split} --out {path}"
            raise UserError(f"{key}: no token store at {path}; make it with: {made}")
        stores.append(store := TokenStore.open(path))
        if views not in (None, store.metadata.views):
            held = store.metadata.views
            raise UserError(
                f"{key}: {path} holds the views {held}, data.views is {views}; make one with: {command} ..."
            )
        store.check_content()
    return as_one(stores)


def open_held_out(path: str, tokenizer: str, store: TokenStore | TokenStores) -> TokenStore | TokenStores:
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
        hashes = {"data_sha256": train, "pictures_sha256": train, "validation_sha256": held_out}
        return Origin(class_names=self.train.class_names, data=self.train.name, **hashes)


def open_pictures(config: TrainConfig, image_size: int, run: Path) -> Pictures:
    """The pictures of `config.data`; `run` is the folder where an earlier part of the run has listed bad ones.

    Both parts are opened (`open_splits`) before a picture is decoded. Raises `UserError` where no images are named or a
    tokenizer would have none to be validated on, and as `open_splits` and `leave_out` do.
    """
    data, key = config.data, "data.validation_split"
    if data.images is None:
        reader = "a tokenizer" if config.run == "tokenizer" else config.run
        raise UserError(f"data.images: {reader} needs the images themselves; choices: {choices()}")
    if data.flip:
        check_mirrored(data.images, "data.flip", data.flip)
    splits = open_splits(
        data.images, data.validation_split, key=key, image_size=image_size, any_order=True,
        classes=data.classes, label_default=data.label_default,
        model_classes=read_origin(config.init).class_names if config.init and config.run != "tokenizer" else None,
    )  # fmt: skip
    train, held_out = splits.train, splits.validation
    if held_out is None and config.run == "tokenizer":
        found = data.validation_split or f"nothing is held out of {train.name}"
        raise UserError(
            f"{key}: {found}, and a tokenizer is validated; name a split of the data, or a share such as 5%"
        )
    notes = [f"not read: {note}" for note in {other_files(train), other_files(held_out)} if note]
    bad = BadImages(data.bad_images, data.bad_images_limit, run / "bad-images.txt", resume=True)
    train = leave_out(train, bad, "train")
    held_out = None if held_out is None else leave_out(held_out, bad, "validation")
    about = [*notes, *filter(None, (bad.note, splits.note))]
    return Pictures(train, held_out, (describe(train), *about), bad)


def preview_samples(
    model: Generator, tokenizer: Tokenizer, path: Path, captions: CaptionFeatures | None = None
) -> None:
    """A grid of all classes in turn, or of some of the captions, which stand under it."""
    condition: Condition = balanced_labels(PREVIEW_IMAGES, max(1, model.num_classes))
    texts: list[str] = []
    if captions is not None:
        rows = captions.spread(PREVIEW_IMAGES)
        condition, texts = captions.read(rows), captions.words(rows).read()
    save_grid(sample(model, tokenizer, condition).images, path, columns=8, captions=texts)


def preview_reconstructions(tokenizer: Tokenizer, validation: ImageBatches, world: World, path: Path) -> None:
    rows = torch.linspace(0, validation.num_items - 1, min(PREVIEW_IMAGES, validation.num_items)).long()
    images = to_device(validation.read(rows), world.device).images
    pairs = torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)
    save_grid(pairs, path, columns=8)
