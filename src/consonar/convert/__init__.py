"""Released weight files to component folders and back, bit for bit.

`convert("c2i_B_256.pt", Path("models/llamagen-b"))` recognises the architecture by the keys and shapes alone, checks
every key, and writes what `load_generator` and `load_tokenizer` read: `config.json`, `model.safetensors`, beside them
`unused.safetensors` (what the file holds and we do not need: a usage buffer, training heads) and `source.json` (where
it came from). `to_official` makes the released layout again, from a converted folder or from one that was trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from consonar.config_io import to_dict
from consonar.convert.back import SOURCE, UNUSED, to_official
from consonar.convert.containers import Weights, read_weights
from consonar.convert.examine import Found, examine, image_size_in_name
from consonar.convert.layouts.janus import split_parts
from consonar.convert.layouts.official import State
from consonar.errors import UserError
from consonar.files.component import save_component
from consonar.files.lock import folder_at_once, is_taken
from consonar.files.weights import check_finite, save_tensors
from consonar.files.writers import file_sha256, write_json
from consonar.json_types import Json, JsonMap
from consonar.model_folders import read_tokenizer, shipped_or_folder
from consonar.origin import Origin

__all__ = ["Converted", "convert", "to_official"]


@dataclass(frozen=True)
class Converted:
    """One component folder that was written, and what is in it."""

    folder: Path
    recognised_as: str
    component: str
    num_parameters: int
    vocab_size: int
    num_tokens: int
    code_dim: int | None
    """Width of a code; None for generators."""
    notes: tuple[str, ...]
    """What was assumed, taken from an entry, ignored, set aside."""


def convert(
    path: Path,
    to: Path,
    *,
    image_size: int | None = None,
    entry: str | None = None,
    tokenizer: str | None = None,
    settings: JsonMap | None = None,
) -> list[Converted]:
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
    weights = read_weights(path, entry)
    halves = split_parts(weights.tensors)
    if len(halves) == 1:
        found, notes = examine_one(weights.tensors, path, image_size, settings)
        if tokenizer is not None and found.official.component == "tokenizer":
            raise UserError("--tokenizer: for generators alone; leave --tokenizer away")
        parts = {"": found}
    else:
        if image_size is not None or tokenizer is not None:
            raise UserError(f"--image-size, --tokenizer: {path} has a tokenizer of its own; leave them away")
        # The tokenizer first, because the generator's config.json names it.
        parts = {
            "tokenizer": examine(halves["tokenizer"], f"{path} (tokenizer)"),
            "generator": examine(halves["generator"], f"{path} (generator)", settings=settings),
        }
        notes = []
    hashes = {file.name: file_sha256(file) for file in weights.files}
    written = []
    with folder_at_once(to) as partial:
        for part, found in parts.items():
            state = halves[part] if part else weights.tensors
            own = tokenizer if not part else str((to / "tokenizer").resolve())
            origin = origin_of(found, own, partial / "tokenizer")
            told = write(partial / part, to / part, found, state, origin, weights, hashes)
            written.append(summary(to / part, found, (*notes, *told)))
    return written


def examine_one(state: State, path: Path, image_size: int | None, settings: JsonMap | None) -> tuple[Found, list[str]]:
    """`examine` for a file with one component, with the image size that its name says where shapes do not."""
    found = examine(state, str(path), image_size=image_size, settings=settings)
    named = image_size_in_name(path)
    if found.config.kind != "llamagen" or image_size is not None or named is None:
        return found, []
    found = examine(state, str(path), image_size=named, settings=settings)
    return found, [f"for images of {named} pixels, because the file's name says so (--image-size says another)"]


def origin_of(found: Found, tokenizer: str | None, beside: Path) -> Json:
    """What a generator's config.json says of its tokenizer, once the sizes are seen to agree; nothing of a tokenizer's.

    `beside` is where a tokenizer from the same file was just written, and `tokenizer` then where it will be.
    """
    if found.official.component == "tokenizer":
        return {}
    if tokenizer is None or tokenizer.startswith("hf:"):
        return to_dict(Origin(tokenizer=tokenizer))
    folder = beside if beside.is_dir() else shipped_or_folder("tokenizer", tokenizer)
    loaded = read_tokenizer(folder, found.module.num_tokens)
    for key in ("vocab_size", "num_tokens"):
        if getattr(loaded, key) != getattr(found.module, key):
            raise UserError(
                f"--tokenizer: {tokenizer} has {key} {getattr(loaded, key)}, the generator {getattr(found.module, key)}"
            )
    name = tokenizer if beside.is_dir() or not Path(tokenizer).is_dir() else str(Path(tokenizer).resolve())
    return to_dict(Origin(tokenizer=name, tokenizer_fingerprint=loaded.fingerprint))


def write(
    folder: Path,
    final: Path,
    found: Found,
    state: State,
    origin: JsonMap,
    weights: Weights,
    hashes: Mapping[str, str],
) -> list[str]:
    """Writes one component folder, and says what was set aside or left alone."""
    official = found.official
    ours, unused = official.to_ours(state, found.config)
    check_finite(ours, str(weights.files[0]))
    head: Json = {"component": official.component, **origin}
    if official.component == "tokenizer":
        head["name"] = final.name if final.name != "tokenizer" else final.parent.name
    save_component(folder, {**head, **to_dict(found.config)}, ours)
    if unused:
        save_tensors(folder / UNUSED, unused)
    source = {
        "recognised_as": official.name,
        "files": dict(hashes),
        "entry": list(weights.entry),
        "ignored_entries": list(weights.ignored),
        "prefix": weights.prefix,
    }
    write_json(folder / SOURCE, source)
    notes = [f"from its entry {'/'.join(weights.entry)!r}"] if weights.entry else []
    if weights.ignored:
        notes.append(f"left alone beside it: {', '.join(weights.ignored[:6])}")
    if unused:
        notes.append(f"set aside for the way back: {len(unused)} tensors ({', '.join(list(unused)[:2])} ...)")
    return notes


def summary(folder: Path, found: Found, notes: tuple[str, ...]) -> Converted:
    module = found.module
    return Converted(
        folder=folder,
        recognised_as=found.official.name,
        component=found.official.component,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        vocab_size=module.vocab_size,
        num_tokens=module.num_tokens,
        code_dim=getattr(module, "code_dim", None),
        notes=notes,
    )
