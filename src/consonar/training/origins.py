"""What a run starts from and is made of: the generator of `init`, the tokenizer, the data.

It is in the run's origin.json: a run is resumed on the same content, wherever that lies by then.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from consonar.components import load_generator, load_tokenizer, model_folder, read_origin, weights_sha256
from consonar.config_io import from_dict
from consonar.data.sources import find_source
from consonar.errors import UserError
from consonar.files.readers import read_json
from consonar.files.weights import load_weights, of_package
from consonar.generators import GENERATORS, build_generator
from consonar.generators.base import GeneratorConfig
from consonar.generators.checked import checked_generator
from consonar.generators.tied import TiedEmbedding
from consonar.json_types import Json
from consonar.model_folders import from_anywhere, own_text_encoder, read_settings
from consonar.origin import MEANING, PARTS, Origin, check, of_tokenizer
from consonar.seeding import generator as seeded
from consonar.tokenizers.base import CodebookTokenizer
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import TrainConfig
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.base import ObjectiveConfig, codebook_of
from consonar.types import Generator, ModelConfig, Tokenizer

FILE = "origin.json"
PLACES = {
    "tokenizer": "tokenizer_fingerprint",
    "text_encoder": "text_encoder_fingerprint",
    "init": "init_sha256",
    "data.tokens": "data_sha256",
    "data.images": "data_sha256",
    "data.validation_tokens": "validation_sha256",
}
"""Options that say where a thing lies, and the hash that says what it is."""
OF_MEMORY = {
    "loop.accumulation", "loop.activation_checkpointing", "loop.async_save", "objective.chunk",
    "parallel.strategy", "parallel.shard_size", "parallel.reshard_after_forward",
    "parallel.param_dtype", "parallel.prefetch_forward", "parallel.prefetch_backward",
}  # fmt: skip
"""Options that change what memory a run takes, and its numbers by rounding (and by which numbers dropout draws): a run
that had too little of it goes on with others."""


def resolve_start(config: TrainConfig) -> TrainConfig:
    """The configuration with what `init` decides filled in: its whole path, the model, and the tokenizer where it was
    left open.

    Raises `UserError` for post-training without `init`, a start model that names no tokenizer, and a folder that is no
    generator.
    """
    start, aligns = config.init, config.run == "post-training"
    if start is None:
        if aligns or config.model is None:
            raise UserError(
                f"init: {config.recipe!r} starts from a trained generator; give its run or model folder, "
                "e.g. --init runs/rear"
            )
        return config
    folder = model_folder(start, "tokenizer" if config.run == "tokenizer" else "generator", "init")
    if config.run == "tokenizer":
        return replace(config, init=from_anywhere("tokenizer", start))
    _, origin, stored, _ = read_settings(folder, "generator", GENERATORS)
    tokenizer = origin.tokenizer if config.tokenizer is None else config.tokenizer
    if tokenizer is None:
        raise UserError(f"tokenizer: {start} does not say which tokenizer it goes with; add --tokenizer")
    encoder = own_text_encoder(folder, origin) if config.text_encoder is None else config.text_encoder
    model = config.model
    if model is not None and aligns:
        check_same_shape(start, stored, model)
    model = stored if model is None or aligns else model
    return replace(
        config, init=from_anywhere("generator", start), tokenizer=tokenizer, text_encoder=encoder, model=model
    )


def load_start(init: str, shape: GeneratorConfig, tokenizer: Tokenizer) -> Generator:
    """The generator of `init`, to be trained, dropout as in `shape`; `UserError` for another shape or tokenizer."""
    check("tokenizer", of_tokenizer(tokenizer), read_origin(init), init, "its tokens mean other codes")
    stored = load_generator(init)
    check_same_shape(init, stored.config, shape)
    model = build_generator(shape)
    model.load_state_dict(stored.state_dict(), assign=of_package(type(model)))  # not where weights may be tied
    return model.requires_grad_(True)


def random_start(seed: int, shape: GeneratorConfig, tokenizer: Tokenizer, device: torch.device) -> Generator:
    """A generator with random weights, and with the embeddings of the tokenizer, on `device`, if it is tied to them."""
    model = build_generator(shape)
    model.reset_parameters(seeded(seed, "init"))
    if isinstance(rows := getattr(model, "embeddings", None), TiedEmbedding):
        rows.tie(codebook_of(tokenizer, device))
    return checked_generator(model, f"model.kind {shape.kind}")


def start_tokenizer(init: str | None, tokenizer: CodebookTokenizer, data: Origin) -> Origin:
    """Gives a tokenizer to train the weights of `init`, where that is named, and returns the origin of the run on these
    data. `UserError` for another shape."""
    if init is None:
        return data
    stored = load_tokenizer(init)
    check_same_shape(init, stored.config, tokenizer.config, "tokenizer")
    tokenizer.load_state_dict(stored.state_dict())
    return replace(data, init=init, init_sha256=weights_sha256(init, "tokenizer"))


def with_heads(init: str, generator: Generator, tokenizer: Tokenizer) -> AlignmentTrainee:
    """The generator with the alignment heads of the run `init`, which are not in its model but in its last checkpoint.

    With a moving average those of the average, as the model. Raises `UserError` for what is no run, for one without
    checkpoints and for one that was trained without heads.
    """
    saved = list_resume(Path(init) / "checkpoints")
    if not saved:
        raise UserError(
            f"objective.embedding_weight: alignment heads are kept in the checkpoints of a reAR run, and {init} has "
            "none; start from the folder of such a run, or set it to 0"
        )
    objective = objective_of_heads(Path(init))
    trainee = AlignmentTrainee(generator, objective.head_specs(generator.num_layers, tokenizer.code_dim))
    if not trainee.specs:
        raise UserError(f"objective.embedding_weight: {init} was trained without alignment heads; set it to 0")
    payload = load_resume(saved[-1])
    weights = payload.get("average") or payload.get("model") or {}
    heads = {key.removeprefix("heads."): value for key, value in weights.items() if key.startswith("heads.")}
    load_weights(trainee.heads, heads, str(saved[-1]))
    return trainee


def objective_of_heads(run: Path) -> ObjectiveConfig:
    """The objective that says which heads a run has: of one that kept those of its start, that one's."""
    path = run / "config.json"
    config = from_dict(read_json(path), str(path), TrainConfig)
    return objective_of_heads(Path(config.init)) if config.init and config.objective.keeps_heads else config.objective


def check_same_shape(where: str, stored: ModelConfig, wanted: ModelConfig, what: str = "generator") -> None:
    """Raises `UserError` for the first key in which the configurations differ; not for dropouts and sizes left open."""
    held = asdict(stored)
    for key, value in asdict(wanted).items():
        if "drop" not in key and (value is False or value not in (0, None)) and held.get(key) != value:
            raise UserError(f"model.{key}: {value!r}, but the {what} in {where} has {held.get(key)!r}")


def origin_of(config: TrainConfig, place: str, fingerprint: str, data: Origin) -> Origin:
    """What a run and its generator say about their making; without names, classes are those of `init`.

    `place` is the data's, `fingerprint` that of the tokenizer. Raises `UserError` where label i of the data is not
    class i of the start model.
    """
    start = Origin()
    if config.init:
        start = read_origin(config.init)
        remedy = "start from a model of such data, or bring the data into the model's order with --classes FILE"
        # Classes are compared where captions are not read: those may have been meant.
        if config.data.images and find_source(config.data.images)[0].has_captions:
            place = f"init: {config.init!r} takes classes, no captions, and not the classes of {place}"
        check(place, data, start, config.init, remedy, parts=("classes",))
        check("text_encoder", data, start, config.init, "its features mean something else", parts=("text_encoder",))
    return replace(
        data,
        tokenizer=from_anywhere("tokenizer", config.tokenizer) if config.tokenizer else None,
        tokenizer_fingerprint=fingerprint,
        class_names=data.class_names or start.class_names,
        init=config.init,
        init_sha256=weights_sha256(config.init) if config.init else None,
    )


def read_run_origin(run: Path) -> Origin:
    """What the run in this folder was made of; nothing is known of one that an older version made."""
    path = run / FILE
    if not path.exists():
        return Origin()
    return from_dict(read_json(path, "remove it to compare places instead of content"), str(path), Origin)


def comparable(config: Json, run: Path) -> dict[str, object]:
    """A run's settings by dotted key, without the places of what its origin.json knows by content, and `OF_MEMORY`."""
    origin = read_run_origin(run)
    left_out = OF_MEMORY | {key for key, name in PLACES.items() if getattr(origin, name) is not None}
    return {key: value for key, value in flat(config, "") if key not in left_out}


def flat(table: Json, prefix: str) -> Iterator[tuple[str, object]]:
    """The values of tables in each other by dotted key."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_same_origin(run: Path, now: Origin) -> None:
    """Raises `UserError` unless what a run is resumed on has the content that it was started on."""
    before = read_run_origin(run)
    remedy = "give what the run was started on (it may have moved), or start another run"
    check("--resume", now, before, f"the start of {run}", remedy, parts=(*MEANING, "data", "validation", "init"))
    for what, _, name in PARTS.values():
        if getattr(before, name) is not None and getattr(now, name) is None:
            raise UserError(f"--resume: the {what} cannot be compared with that at the start of {run}; {remedy}")
