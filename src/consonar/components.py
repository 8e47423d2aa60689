"""Generators and tokenizers by name, read and written: shipped with the package, a run, a model folder, or `hf:` a
released file, which is converted once into the cache folder and read from there."""

import shutil
from pathlib import Path

import torch

from consonar.config_io import to_dict
from consonar.convert import SOURCE, convert
from consonar.cpu.kernels import tune
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.files.readers import plain_name, read_json
from consonar.files.weights import component_config, load_module, of_package, save_component
from consonar.files.writers import file_sha256
from consonar.generators import GENERATORS
from consonar.generators.checked import checked_generator
from consonar.hub import PREFIX, Wanted, read_name, released_file
from consonar.model_folders import own_text_encoder, read_settings, read_tokenizer, shipped_or_folder
from consonar.networks.text_encoders import load_caption_reader, readers
from consonar.options import is_whole
from consonar.origin import Origin, check, check_distinct
from consonar.records import device_of
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Generator, TextEncoder, Weights


def save_generator(generator: Generator, folder: str | Path, origin: Origin, *, dtype: str = "float32") -> None:
    """Writes a model folder: the generator's shape, its origin and its weights; `dtype` float16 halves the file."""
    config = {"component": "generator", **to_dict(origin), **to_dict(generator.config)}
    save_component(Path(folder), config, stored(generator, dtype))


def save_tokenizer(tokenizer: CodebookTokenizer, folder: str | Path, *, dtype: str = "float32") -> None:
    """Writes a model folder; `dtype` float16 halves the file (the fingerprint is that of the rounded weights)."""
    config = {"component": "tokenizer", "name": tokenizer.name, **to_dict(tokenizer.config)}
    save_component(Path(folder), config, stored(tokenizer, dtype))


def stored(model: Weights, dtype: str) -> dict[str, torch.Tensor]:
    """Its weights in this type; whole numbers and complex ones as they are."""
    own, to = model.state_dict(), getattr(torch, dtype)
    return {key: value.to(to) if value.is_floating_point() else value for key, value in own.items()}


def model_folder(name: str | Path, what: str = "generator", key: str | None = None) -> Path:
    """The model folder that is meant: the path, `model` inside a run folder, that of a shipped or an `hf:` model.

    `what` is `generator` or `tokenizer`. Raises `UserError` where there is none, which begins with the option `key`
    (None: `what`), and for a run that has no model yet.
    """
    return fetch_component(str(name), what) if str(name).startswith(PREFIX) else shipped_or_folder(what, name, key)


def read_component_kind(path: str | Path) -> str:
    """What a run or model folder holds: `generator` or `tokenizer`."""
    return str(component_config(model_folder(path)).get("component", ""))


def read_origin(path: str | Path) -> Origin:
    """The origin of a generator by name; `UserError` for what is no generator."""
    return read_settings(model_folder(path), "generator", GENERATORS)[1]


def weights_sha256(path: str | Path, what: str = "generator") -> str:
    """Of a model by name; `UserError` for a folder that lacks a file."""
    component_config(folder := model_folder(path, what))
    return file_sha256(folder / "model.safetensors")


def load_generator(path: str | Path) -> Generator:
    """A frozen generator in evaluation mode on the CPU: a name (`openmoji`), a run, a model folder, a released file.

    A released file is `hf:` and the name of a published model or owner/repository/file (see `consonar.hub`). The
    generator's `origin` says what it was made of and with. Raises `UserError` for a missing, damaged or unfinished
    folder, for weights of another shape, and for more names of classes than classes.
    """
    folder = model_folder(path)
    _, origin, settings, generator_class = read_settings(folder, "generator", GENERATORS)
    loaded = load_module(lambda: generator_class(settings), folder, lean=of_package(generator_class))
    generator = checked_generator(tune(loaded), str(folder))
    generator.origin = origin
    names, where = origin.class_names or (), str(folder / "config.json")
    if len(names) > generator.num_classes:
        raise UserError(f"{where}: class_names are {len(names)} for {generator.num_classes} classes")
    check_distinct(names, where)
    return generator


def load_tokenizer(name_or_path: str | Path, *, num_tokens: int | None = None) -> CodebookTokenizer:
    """A frozen tokenizer in evaluation mode on the CPU: a name (`openmoji-64`), a run, a model folder, a released file.

    `num_tokens`: for images of so many tokens, where its architecture takes any image size (see `tokenizers.resized`).
    Raises `UserError` for an unknown name, a missing or damaged folder, or weights of another shape.
    """
    if num_tokens is not None and not (is_whole(num_tokens) and num_tokens >= 1):
        raise UserError(f"num_tokens: {num_tokens!r} is not a number of tokens, 1 or more")
    return read_tokenizer(model_folder(name_or_path, "tokenizer"), num_tokens)


def load_own_tokenizer(path: str | Path, name: str | None = None) -> CodebookTokenizer:
    """The tokenizer that a stored generator was trained with, or `name`, which has to be the same, frozen, on the CPU.
    `UserError` when it is not there or its weights have changed since: other codes would decode to noise."""
    _, origin, settings, _ = read_settings(model_folder(path), "generator", GENERATORS)
    chosen = origin.tokenizer if name is None else name
    if chosen is None:
        raise UserError(f"tokenizer: {path} does not say which it was trained with; name one, e.g. --tokenizer FOLDER")
    tokenizer = load_tokenizer(chosen, num_tokens=settings.num_tokens or None)
    here = Origin(tokenizer=chosen, tokenizer_fingerprint=tokenizer.fingerprint)
    check("tokenizer", here, origin, str(path), "it has changed since; train again, or put back the one it was")
    return tokenizer


def load_own_text_encoder(
    path: str | Path, generator: Generator, name: str | None = None, *, device: torch.device | None = None
) -> TextEncoder:
    """The text encoder that a stored generator of captions was trained with, or `name`, which has to be the same, on
    `device` (None: where the generator is).

    `UserError` for a generator that takes no captions, and where the encoder is not there or has changed.
    """
    folder = model_folder(path)
    _, origin, shape, _ = read_settings(folder, "generator", GENERATORS)
    if shape.has_classes:
        raise UserError(f"prompts: {path} takes class ids 0..{generator.num_classes - 1}, no captions")
    chosen = own_text_encoder(folder, origin) if name is None else name
    if chosen is None:
        raise UserError(
            f"text_encoder: {path} does not say what reads its captions; add --text-encoder: {readers(shape)}"
        )
    encoder = load_caption_reader(shape, chosen, device or device_of(generator), origin.text_encoder_fingerprint)
    here = Origin(text_encoder=chosen, text_encoder_fingerprint=encoder.fingerprint)
    check("text_encoder", here, origin, str(path), "its features mean something else; give the one it was trained with")
    return encoder


def fetch_component(text: str, component: str) -> Path:
    """The component folder of an `hf:` name, converted at the first call, and again when the file was replaced.

    Raises `UserError` when the file cannot be had, with where to put it; when its hash is not the published one; when
    it cannot be converted; and when it holds no `component`.
    """
    wanted = read_name(text)
    folder = wanted.converted
    if not is_current(wanted, folder):
        with hold(folder.with_name(f".{folder.name}.converting"), wait=True):  # a download may take hours
            if not is_current(wanted, folder):  # else another process has converted it meanwhile
                convert_file(wanted, folder)
    for place in (folder / component, folder):
        if (place / "config.json").is_file() and read_json(place / "config.json").get("component") == component:
            return place
    raise UserError(f"{text}: holds no {component}")


def is_current(wanted: Wanted, folder: Path) -> bool:
    """Whether `folder` is the whole conversion of the file that lies at its place, by content; where none lies there,
    of the file that was downloaded: those do not change."""
    records = [path for part in ("", "generator", "tokenizer") if (path := folder / part / SOURCE).is_file()]
    if not records or not wanted.place.is_file():
        return bool(records)
    files = read_json(records[0]).get("files")
    if not isinstance(files, dict) or not all(map(plain_name, files)):
        return False
    beside = {wanted.place.with_name(name): sha256 for name, sha256 in files.items()}
    return wanted.place in beside and all(p.is_file() and file_sha256(p) == sha256 for p, sha256 in beside.items())


def convert_file(wanted: Wanted, folder: Path) -> None:
    """Converts the released file into `folder`, in the place of an older conversion."""
    file = released_file(wanted)
    model = wanted.published
    if model is not None and model.sha256 is not None and file_sha256(file) != model.sha256:
        raise UserError(f"{wanted.text}: {file} is not the published file (its SHA-256 is not {model.sha256[:12]}...)")
    shutil.rmtree(folder, ignore_errors=True)
    convert(file, folder, image_size=wanted.image_size, tokenizer=model.tokenizer if model else None)
