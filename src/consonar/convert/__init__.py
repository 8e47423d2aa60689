"""Released weight files to component folders and back, bit for bit.

`convert("c2i_B_256.pt", Path("models/llamagen-b"))` recognises the architecture by the keys and shapes alone, checks
every key, and writes what `load_generator` and `load_tokenizer` read: `config.json`, `model.safetensors`, beside them
`unused.safetensors` (what the file holds and we do not need: a usage buffer, training heads) and `source.json` (where
it came from). `to_official` makes the released layout again, from a converted folder or from one that was trained here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from consonar.config_io import from_dict, to_dict
from consonar.convert.containers import TORCH_ENDINGS, Weights, read_weights
from consonar.convert.layouts import OFFICIALS, generators
from consonar.convert.layouts.janus import split_parts
from consonar.convert.layouts.official import Official, Shapes, State, shapes_of
from consonar.data.transforms import IMAGE_SIDE
from consonar.errors import UserError, reading
from consonar.files import weights as files
from consonar.files.lock import folder_at_once, is_taken
from consonar.files.readers import read_json
from consonar.files.writers import write_atomically, write_json
from consonar.generators import GENERATORS
from consonar.generators.janus import JanusConfig
from consonar.json_types import Json, JsonMap
from consonar.model_folders import from_anywhere, read_settings, read_tokenizer, shipped_or_folder
from consonar.networks import prompts
from consonar.origin import Origin
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Generator, Grid, Kind, ModelConfig

SOURCE, UNUSED = "source.json", "unused.safetensors"
KINDS: dict[str, Mapping[str, Kind[ModelConfig, Generator | CodebookTokenizer]]] = {
    "tokenizer": TOKENIZERS, "generator": GENERATORS,
}  # fmt: skip
# Reduction of the tokenizers that LlamaGen's released generators were trained with.
LLAMAGEN_REDUCTION = 16


@dataclass(frozen=True)
class Found:
    """What a state dict is: the record, our configuration, our module on the meta device, and our tensors."""

    official: Official
    config: ModelConfig
    module: Generator | CodebookTokenizer
    ours: State
    unused: State
    """What the way back needs as well."""
    folder: Path = Path()
    """Where it was written, as a component."""
    notes: tuple[str, ...] = ()
    """What was assumed, taken from an entry, ignored, set aside."""
    reads: str | None = None
    """Fingerprint of what reads prompts for it, where that is kept with it."""


def convert(
    path: Path,
    to: Path,
    *,
    image_size: int | None = None,
    entry: str | None = None,
    tokenizer: str | None = None,
    settings: JsonMap | None = None,
) -> list[Found]:
    """Writes a released file as the component folder `to`; with both halves in it, as TO/generator and TO/tokenizer.

    `image_size` says what LlamaGen's shapes cannot (default: 384 or 512 if the file name says so, else 256); `settings`
    replaces other fields of the configuration (with both halves: of the generator's); `entry` is the part of a training
    checkpoint to take; `tokenizer` is written down as the one that a generator belongs to, after a check that the sizes
    agree. Raises `UserError` when `to` exists, for a file that cannot be read, and for keys that are unknown or
    missing; then nothing is written.
    """
    if is_taken(to):
        raise UserError(f"--to: {to} exists; choose another folder")
    if (path / "config.json").is_file() and (path / SOURCE).is_file():
        raise UserError(f"{path}: converted already; the way back is --to-official FILE")
    if image_size is not None and "image_size" in (settings or {}):
        raise UserError(f"--image-size: {image_size}, and --setting has image_size too; keep one")
    weights = read_weights(path, entry)
    notes, halves = weights.notes, split_parts(weights.tensors)
    if len(halves) == 1:
        named = re.search(r"(?<!\d)(384|512)(?!\d)", path.name)
        if named and image_size is None and generators.LLAMAGEN.recognises(shapes_of(weights.tensors)):
            image_size = int(named[1])
            told = f"for images of {image_size} pixels, because the file's name says so (--image-size says another)"
            notes = [told, *notes]
        found = examine(weights.tensors, str(path), image_size=image_size, settings=settings)
        if tokenizer is not None and found.official.component == "tokenizer":
            raise UserError("--tokenizer: for generators alone; leave --tokenizer away")
        parts = {"": found}
    else:
        if image_size is not None or tokenizer is not None:
            raise UserError(f"--image-size, --tokenizer: {path} has a tokenizer of its own; leave them away")
        tokenizer = str((to / "tokenizer").resolve())
        # The tokenizer first, because the generator's config.json names it.
        parts = {
            part: examine(halves[part], f"{path} ({part})", settings=changes)
            for part, changes in (("tokenizer", None), ("generator", settings))
        }
    beside, words = weights.files[0].with_name(prompts.FILE), None
    for part, found in parts.items():
        if isinstance(found.config, JanusConfig):
            words = beside if beside.is_file() else None
            parts[part] = with_words(found, found.config, words, chosen=settings or {})
    with folder_at_once(to) as partial:
        return [
            write(partial / part, to / part, found, about(found, to / part, tokenizer, partial), weights, notes, words)
            for part, found in parts.items()
        ]


def with_words(found: Found, shape: JanusConfig, words: Path | None, chosen: JsonMap) -> Found:
    """A generator of this shape with the tokenizer.json of its release, whose padding token it gets unless another was
    `chosen`. `UserError` for one that is not its own."""
    if words is None:
        note = f"no {prompts.FILE} beside the file: put it into the generator's folder, to ask for pictures in words"
        return replace(found, notes=(note,))
    if "pad_token" not in chosen:
        pad = prompts.id_of(prompts.read_words(words, str(words)), prompts.PAD, str(words))
        shape = replace(shape, pad_token=pad)
    encoder = prompts.load_prompt_tokenizer(str(words.parent), shape)
    note = f"prompts are read by {prompts.FILE}, which is kept with the generator"
    return replace(found, config=shape, notes=(note,), reads=encoder.fingerprint)


def recognise(shapes: Shapes, where: str) -> Official:
    """The one record that these keys and shapes are of; `UserError` lists what is known and what the file holds."""
    found = [official for official in OFFICIALS if official.recognises(shapes)]
    assert len(found) < 2, f"{where}: recognised as {[official.name for official in found]}"
    if not found:
        known = ", ".join(official.name for official in OFFICIALS)
        held = ", ".join(sorted(shapes)[:4])
        raise UserError(f"{where}: not a released model that is known here ({known}); its first keys: {held}")
    return found[0]


def build(component: str, config: ModelConfig) -> Generator | CodebookTokenizer:
    """The tokenizer or generator of a configuration, on the meta device: keys and shapes, no memory."""
    with torch.device("meta"):
        return KINDS[component][config.kind].model(config)


def examine(state: State, where: str, *, image_size: int | None = None, settings: JsonMap | None = None) -> Found:
    """What a state dict is. Reads shapes and types alone; `UserError` for unknown or missing keys, or other shapes."""
    shapes = shapes_of(state)
    official = recognise(shapes, where)
    try:
        config = official.config(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        cause = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: looks like {official.name}, but {cause}") from error
    changes = {**(sized(config, image_size, where) if image_size is not None else {}), **(settings or {})}
    if changes:
        config = from_dict({**to_dict(config), **changes}, where, type(config))
    ours, unused = official.to_ours(state, config)
    module = build(official.component, config)
    files.check_weights(module.state_dict(), ours, f"{where}: looks like {official.name}")
    back = official.to_official(ours, unused, config)
    assert shapes_of(back) == shapes, f"{official.name}: the way back changes keys or shapes"
    return Found(official, config, module, ours, unused)


def sized(config: ModelConfig, image_size: int, where: str) -> Json:
    """The fields of `config` for this image size; `UserError` where the shapes say it already."""
    IMAGE_SIDE.check("--image-size", image_size)
    if hasattr(config, "image_size"):
        return {"image_size": image_size}
    if config.kind != "llamagen":
        raise UserError(f"--image-size: the shapes of {where} say how many tokens an image has; leave it away")
    side, rest = divmod(image_size, LLAMAGEN_REDUCTION)
    if rest:
        raise UserError(f"--image-size: {image_size} is not a multiple of {LLAMAGEN_REDUCTION}")
    return {"grid": to_dict(Grid(side, side)), "num_tokens": side * side}


def about(found: Found, final: Path, tokenizer: str | None, partial: Path) -> Json:
    """What config.json says besides the shape: of a generator, its tokenizer, once the sizes are seen to agree.

    `final` is where the folder will be. A tokenizer from the same file was just written into `partial`; `tokenizer` is
    then where it will be.
    """
    if found.official.component == "tokenizer":
        return {"component": "tokenizer", "name": final.name if final.name != "tokenizer" else final.parent.name}
    origin = Origin(tokenizer=tokenizer)
    if tokenizer is not None and not tokenizer.startswith("hf:"):
        beside = partial / "tokenizer"
        folder = beside if beside.is_dir() else shipped_or_folder("tokenizer", tokenizer)
        loaded = read_tokenizer(folder, found.module.num_tokens)
        for key in ("vocab_size", "num_tokens"):
            theirs, ours = getattr(loaded, key), getattr(found.module, key)
            if theirs != ours:
                raise UserError(f"--tokenizer: {tokenizer} has {key} {theirs}, the generator {ours}")
        origin = Origin(tokenizer=from_anywhere("tokenizer", tokenizer), tokenizer_fingerprint=loaded.fingerprint)
    return {"component": "generator", **to_dict(replace(origin, text_encoder_fingerprint=found.reads))}


def write(
    folder: Path, final: Path, found: Found, head: JsonMap, weights: Weights, notes: list[str], words: Path | None
) -> Found:
    """Writes the component folder that will be `final`, and says what is in it; with a copy of `words` if it reads
    prompts by them."""
    files.check_finite(found.ours, str(weights.files[0]))
    notes = [*found.notes, *notes]
    files.save_component(folder, {**head, **to_dict(found.config)}, found.ours)
    if found.unused:
        files.save_tensors(folder / UNUSED, found.unused)
        held = ", ".join(list(found.unused)[:2])
        notes = [*notes, f"set aside for the way back: {len(found.unused)} tensors ({held} ...)"]
    if words is not None and found.reads is not None:
        write_atomically(folder / prompts.FILE, lambda path: path.write_bytes(words.read_bytes()))
    write_json(folder / SOURCE, {"recognised_as": found.official.name, **weights.source})
    return replace(found, folder=final, notes=tuple(notes))


def to_official(folder: Path, out: Path) -> str:
    """Writes the released layout of a component folder to a .pt or .safetensors file; returns the architecture's name.

    A converted folder gives the tensors of the file that it came from, bit for bit, in the same entry; a folder with
    both halves gives one file. One that was trained here gives what the released code loads. Raises `UserError` when
    `out` exists and for a model that has no released layout.
    """
    check_new(out)
    if out.suffix not in (*TORCH_ENDINGS, ".safetensors"):
        raise UserError(
            f"--to-official: {out} ends in {out.suffix!r}; choose .safetensors or {', '.join(TORCH_ENDINGS)}"
        )
    halves = [folder / part for part in ("generator", "tokenizer") if (folder / part / "config.json").is_file()]
    parts = [official_state(half) for half in halves or [files.released(folder, "--to-official")]]
    state = {key: value for _, tensors, _ in parts for key, value in tensors.items()}
    check_new(out)  # another may have come meanwhile
    if out.suffix == ".safetensors":
        files.save_tensors(out, state)
    else:
        payload: Mapping[str, object] = state
        for key in reversed(parts[-1][2]):
            payload = {key: payload}
        write_atomically(out, lambda path: torch.save(payload, path))
    return " and ".join(name for name, _, _ in parts)


def check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"--to-official: {out} exists; choose another name")


def official_state(folder: Path) -> tuple[str, State, list[str]]:
    """Architecture, released state dict and entry of one component folder."""
    component = str(files.component_config(folder).get("component"))
    if component not in KINDS:
        raise UserError(f"{folder}: not a folder of a tokenizer or generator (component in config.json)")
    _, _, config, _ = read_settings(folder, component, KINDS[component])
    ours = files.map_tensors(folder / "model.safetensors")
    unused = files.map_tensors(folder / UNUSED) if (folder / UNUSED).is_file() else {}
    if (folder / SOURCE).is_file():
        name, entry = read_source(folder / SOURCE)
        known = [official for official in OFFICIALS if official.name == name]
    else:
        shapes, entry = shapes_of(ours), []
        known = [official for official in OFFICIALS if official.component == component and official.recognises(shapes)]
    if not known:
        raise UserError(f"{folder}: a {component} of kind {config.kind!r} has no released layout that is known here")
    return known[0].name, known[0].to_official(ours, unused, config), entry


def read_source(path: Path) -> tuple[str, list[str]]:
    """What a converted folder was recognised as, and the entry that it was taken from."""
    source = read_json(path, "convert again")
    with reading(path, "a record of where a model came from", "convert again"):
        name, entry = source["recognised_as"], source["entry"]
        if not (isinstance(name, str) and isinstance(entry, list) and all(isinstance(key, str) for key in entry)):
            raise TypeError("recognised_as is a text, entry a list of texts")
    return name, entry
