"""Assembles a run from its configuration: data, model, objective, tracker; then hands over to the loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from consonar import checkpoint, distributed
from consonar.config import TrainConfig
from consonar.config_io import to_dict
from consonar.data.loader import ImageBatches, TokenBatches
from consonar.data.tokens import TokenStore
from consonar.distributed import World
from consonar.errors import UserError
from consonar.generators import Origin, save_generator
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.seeding import derive_seed, generator
from consonar.tokenizers import SHIPPED, load_tokenizer, save_tokenizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.tracking import Tracker, check_sinks
from consonar.training.loop import Batches, Callbacks, State, to_device, train_loop
from consonar.training.objectives import Consistency, ConsistencyConfig
from consonar.training.optim import build_optimizer
from consonar.training.trainee import Trainee
from consonar.training.vq_objective import Reconstruction, ReconstructionConfig, TokenizerTrainee
from consonar.types import Batch, Objective, Tokenizer

PREVIEW_IMAGES = 16


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, stop_at: int | None = None, quiet: bool = False
) -> Path:
    """Runs a configuration and returns the run folder `out`.

    The folder holds config.json, metrics.jsonl, samples/, checkpoints/ (to resume) and model/ (the released component:
    the generator without training-only heads, or the tokenizer). `resume` goes on from the last checkpoint; the
    configuration must be the stored one. `stop_at` ends early at that step, as an interruption would.

    Raises `UserError` when the folder already has a run, or for data that do not fit, and `NonFiniteLoss`.
    """
    if stop_at is not None and stop_at < 1:
        raise UserError(f"--stop-at: {stop_at} is not a step, 1 or more")
    out = Path(out)
    world = distributed.start(config.loop.device)
    try:
        return _train(config, out, world, resume=resume, stop_at=stop_at, quiet=quiet)
    finally:
        distributed.stop(world)


def _train(config: TrainConfig, out: Path, world: World, *, resume: bool, stop_at: int | None, quiet: bool) -> Path:
    per_process, rest = divmod(config.loop.batch_size, world.size)
    if rest or per_process % config.loop.accumulation:
        raise UserError(
            f"loop.batch_size: {config.loop.batch_size} is not a multiple of {world.size} processes "
            f"x {config.loop.accumulation} micro-batches"
        )
    config = with_validation(config)
    check_sinks(config.loop.trackers)
    check_folder(config, out, resume)
    build = build_generator_run if isinstance(config.model, ReARConfig) else build_tokenizer_run
    trainee, objective, batches, callbacks = build(config, world, per_process)
    # From here on dropout is the only draw from the global generator; its state is in the checkpoints.
    torch.manual_seed(derive_seed(config.seed, "dropout", world.rank))
    trainee.to(world.device)
    if config.loop.compile:
        compile_blocks(trainee)
    average = {k: v.detach().clone() for k, v in trainee.state_dict().items()} if config.loop.ema_decay else None
    state = State(trainee, build_optimizer(trainee, config.optim), average, device=world.device)
    saved = checkpoint.list_resume(out / "checkpoints")
    if resume and saved:
        state.restore(checkpoint.load_resume(saved[-1]), str(saved[-1]))
        if not world.is_main:  # the stored dropout state is that of rank 0: the others must not repeat its draws
            torch.manual_seed(derive_seed(config.seed, "dropout", world.rank, state.step))
    distributed.barrier(world)
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(config), indent=1) + "\n"
        checkpoint.write_atomically(out / "config.json", lambda path: path.write_text(text))
    tracker = Tracker(
        out, to_dict(config), total_steps=config.loop.steps, resume_step=state.step, sinks=config.loop.trackers,
        enabled=world.is_main, quiet=quiet, description=config.recipe,
    )  # fmt: skip
    try:
        train_loop(
            config, state, objective, batches,
            tracker=tracker, folder=out, world=world, callbacks=callbacks, stop_at=stop_at,
        )  # fmt: skip
    finally:
        tracker.close()
    if world.is_main and state.step == config.loop.steps:
        export(state, out / "model", config, batches)
    return out


def with_validation(config: TrainConfig) -> TrainConfig:
    """The configuration with the validation store that lies beside the training store named, where it was left open."""
    beside = f"{config.data.tokens}-validation"
    if config.data.tokens and config.data.validation_tokens is None and Path(beside).is_dir():
        return replace(config, data=replace(config.data, validation_tokens=beside))
    return config


def check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuses a folder that holds a run, unless `resume` is set and the run is this one."""
    stored = out / "config.json"
    if not stored.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out: {out} exists and is not a run; choose another folder")
        if resume:
            raise UserError(f"--resume: {out} holds no run")
        return
    if not resume:
        raise UserError(f"--out: {out} already holds a run; choose another folder, or add --resume to go on with it")
    # Tuples are lists in JSON: compare what would be written.
    before, now = json.loads(stored.read_text()), json.loads(json.dumps(to_dict(config)))
    if before != now:
        key, ours, theirs = first_difference(now, before)
        raise UserError(f"--resume: {key} is {ours!r}, but the run in {out} was started with {theirs!r}")


def first_difference(now: dict[str, Any], before: dict[str, Any], path: str = "") -> tuple[str, Any, Any]:
    """Dotted key and both values of the first place where two nested dicts differ; they differ somewhere."""
    key = next(k for k in {**now, **before} if k not in before or k not in now or before[k] != now[k])
    ours, theirs = now.get(key), before.get(key)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return first_difference(ours, theirs, f"{path}{key}.")
    return f"{path}{key}", ours, theirs


def build_generator_run(
    config: TrainConfig, world: World, batch_size: int
) -> tuple[nn.Module, Objective, Batches, Callbacks]:
    assert isinstance(config.model, ReARConfig) and isinstance(config.objective, ConsistencyConfig) and config.tokenizer
    tokenizer = load_tokenizer(config.tokenizer).to(world.device)
    store = open_store(config.data.tokens, "data.tokens", tokenizer)
    shape = config.model.sized(store.vocab_size, store.num_tokens, max(1, store.num_classes))
    trainee = Trainee(ReARGenerator(shape), config.objective.head_specs(shape.num_layers, tokenizer.code_dim))
    trainee.generator.reset_parameters(generator(config.seed, "init"))
    trainee.reset_heads(generator(config.seed, "init_heads"))
    objective = Consistency(
        config.objective, tokenizer, total_steps=config.loop.steps, seed=config.seed, rank=world.rank
    )
    batches = TokenBatches(store, batch_size=batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    callbacks = Callbacks(preview=lambda model, path: preview_samples(model.generator, tokenizer, path))
    if config.data.validation_tokens:
        held_out = open_store(config.data.validation_tokens, "data.validation_tokens", tokenizer)
        check_classes(store, held_out)
        validation = TokenBatches(held_out, batch_size=batch_size, seed=config.seed)
        callbacks.validate = lambda model: objective.validate(model, on_device(validation, batch_size, world))
    return trainee, objective, batches, callbacks


def build_tokenizer_run(
    config: TrainConfig, world: World, batch_size: int
) -> tuple[nn.Module, Objective, Batches, Callbacks]:
    assert isinstance(config.model, VQConfig) and isinstance(config.objective, ReconstructionConfig)
    if not config.data.images:
        raise UserError(
            "data.images: a tokenizer needs an image source; "
            "choices: openmoji, a folder, imagefolder:PATH, hf:owner/name"
        )
    tokenizer = VQTokenizer(config.model, name=config.recipe.removeprefix("tokenizer-"))
    trainee = TokenizerTrainee(tokenizer, discriminator=config.objective.discriminator_weight > 0)
    reset_trainee(trainee, config.seed)
    objective = Reconstruction(config.objective, total_steps=config.loop.steps, seed=config.seed, world=world)
    images = load_images(config.data.images, "train", config.model.image_size)
    batches = ImageBatches(
        images,
        None,
        batch_size=batch_size,
        seed=config.seed,
        flip=config.data.flip,
        rank=world.rank,
        world_size=world.size,
    )
    held_out = load_images(config.data.images, "validation", config.model.image_size)
    validation = ImageBatches(held_out, None, batch_size=min(batch_size, len(held_out)), seed=config.seed)
    callbacks = Callbacks(
        validate=lambda model: objective.validate(model, on_device(validation, batch_size, world)),
        preview=lambda model, path: preview_reconstructions(model.tokenizer, validation, world, path),
    )
    return trainee, objective, batches, callbacks


def open_store(path: str | None, key: str, tokenizer: Tokenizer) -> TokenStore:
    """A token store made with this tokenizer, or a `UserError` that says how to make one."""
    if not path:
        raise UserError(
            f"{key}: no token store given; make one with: "
            f"consonar tokenize --tokenizer {tokenizer.name} --data ... --out DIR"
        )
    if not Path(path).exists():
        split = " --split validation" if "validation" in key else ""
        raise UserError(
            f"{key}: no token store at {path}; make it with: "
            f"consonar tokenize --tokenizer {tokenizer.name} --data openmoji{split} --out {path}"
        )
    store = TokenStore.open(path)
    store.check_tokenizer(tokenizer)
    return store


def check_classes(store: TokenStore, held_out: TokenStore) -> None:
    """Raises `UserError` unless label i means the same in both stores, and training has every label of validation."""
    same_names = held_out.class_names == store.class_names
    if (
        not same_names
        or held_out.num_classes > store.num_classes
        or bool(held_out.num_classes) != bool(store.num_classes)
    ):
        ours, theirs = (", ".join(s.class_names or ()) or f"{s.num_classes} without names" for s in (store, held_out))
        raise UserError(
            f"data.validation_tokens: {held_out.path} has the classes {theirs}, but {store.path} has {ours}; "
            "tokenize both as splits of one data set"
        )


def load_images(spec: str, split: str, image_size: int) -> torch.Tensor:
    """All images of a source, centre-cropped: (n, S, S, 3) uint8 in memory."""
    import numpy as np

    from consonar.data.images import open_source
    from consonar.data.transforms import center_crop

    source = open_source(spec, split=split, image_size=image_size)
    return torch.from_numpy(np.stack([np.asarray(center_crop(record.image, image_size)) for record in source]))


def on_device(batches: Any, batch_size: int, world: World) -> Iterator[Batch]:
    return (to_device(batch, world.device) for batch in batches.ordered(batch_size))


@torch.no_grad()
def reset_trainee(trainee: TokenizerTrainee, seed: int) -> None:
    """The layers' default initialisation, drawn from the run's seed whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        for module in trainee.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        trainee.tokenizer.quantize.embedding.weight.uniform_(-1, 1)


def compile_blocks(trainee: nn.Module) -> None:
    """Compiles the generator's blocks (or the tokenizer's networks) in place; state-dict keys do not change."""
    if isinstance(trainee, Trainee):
        for block in trainee.generator.blocks:
            block.compile()
    else:
        assert isinstance(trainee, TokenizerTrainee)
        trainee.tokenizer.encoder.compile()
        trainee.tokenizer.decoder.compile()


def export(state: State, folder: Path, config: TrainConfig, batches: Batches) -> None:
    """Writes the released component: the averaged weights where there is an average, heads left out."""
    model = state.model
    if state.average is not None:
        model.load_state_dict(state.average)
    if isinstance(model, Trainee):
        assert isinstance(batches, TokenBatches) and config.tokenizer
        store = batches.store
        # A folder is stored whole, so that the model works from any directory.
        name = config.tokenizer if config.tokenizer in SHIPPED else str(Path(config.tokenizer).resolve())
        origin = Origin(tokenizer=name, tokenizer_fingerprint=store.fingerprint, class_names=store.class_names)
        save_generator(model.generator, folder, origin)
    else:
        assert isinstance(model, TokenizerTrainee)
        save_tokenizer(model.tokenizer, folder)


def preview_samples(model: ReARGenerator, tokenizer: Tokenizer, path: Path) -> None:
    from consonar.pictures import save_grid
    from consonar.sampling.sample import SamplerConfig, sample

    labels = torch.arange(PREVIEW_IMAGES) % model.num_classes
    result = sample(model, tokenizer, labels, seeds=range(PREVIEW_IMAGES), config=SamplerConfig())
    save_grid(result.images, path, columns=8)


def preview_reconstructions(tokenizer: VQTokenizer, validation: ImageBatches, world: World, path: Path) -> None:
    from consonar.pictures import save_grid

    rows = torch.linspace(0, validation.num_items - 1, min(PREVIEW_IMAGES, validation.num_items)).long()
    images = validation.images[rows].permute(0, 3, 1, 2).float().to(world.device) / 127.5 - 1
    pairs = torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)
    save_grid(pairs, path, columns=8)
