"""The way back: a component folder in the released layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from consonar.convert.containers import TORCH_ENDINGS
from consonar.convert.layouts import OFFICIALS
from consonar.convert.layouts.official import State, shapes_of
from consonar.errors import UserError, reading
from consonar.files.component import component_config, released
from consonar.files.readers import read_json
from consonar.files.weights import map_tensors, save_tensors
from consonar.files.writers import write_atomically
from consonar.generators import GENERATORS
from consonar.model_folders import read_settings
from consonar.tokenizers import TOKENIZERS

SOURCE, UNUSED = "source.json", "unused.safetensors"


def to_official(folder: Path, out: Path) -> str:
    """Writes the released layout of a component folder to a .pt or .safetensors file; returns the architecture's name.

    A converted folder gives the tensors of the file that it came from, bit for bit, in the same entry; a folder with
    both halves gives one file. One that was trained here gives what the released code loads. Raises `UserError` when
    `out` exists and for a model that has no released layout.
    """
    if out.exists():
        raise UserError(f"--to-official: {out} exists; choose another name")
    if out.suffix not in (*TORCH_ENDINGS, ".safetensors"):
        raise UserError(
            f"--to-official: {out} ends in {out.suffix!r}; choose .safetensors or {', '.join(TORCH_ENDINGS)}"
        )
    halves = [folder / part for part in ("generator", "tokenizer") if (folder / part / "config.json").is_file()]
    state: State = {}
    names: list[str] = []
    entry: list[str] = []
    for half in halves or [released(folder, "--to-official")]:
        name, tensors, entry = official_state(half)
        names.append(name)
        state |= tensors
    if out.suffix == ".safetensors":
        save_tensors(out, state)
    else:
        payload: dict[str, Any] = state
        for key in reversed(entry):
            payload = {key: payload}
        write_atomically(out, lambda path: torch.save(payload, path))
    return " and ".join(names)


def official_state(folder: Path) -> tuple[str, State, list[str]]:
    """Architecture, released state dict and entry of one component folder."""
    component = str(component_config(folder).get("component"))
    tables: dict[str, dict[str, Any]] = {"tokenizer": {**TOKENIZERS}, "generator": {**GENERATORS}}
    kinds = tables.get(component)
    if kinds is None:
        raise UserError(f"{folder}: not a folder of a tokenizer or generator (component in config.json)")
    _, _, config, _ = read_settings(folder, component, kinds)
    ours = map_tensors(folder / "model.safetensors")
    unused = map_tensors(folder / UNUSED) if (folder / UNUSED).is_file() else {}
    entry: list[str] = []
    if (folder / SOURCE).is_file():
        name, entry = read_source(folder / SOURCE)
        official = next((o for o in OFFICIALS if o.name == name), None)
    else:
        shapes = shapes_of(ours)
        official = next((o for o in OFFICIALS if o.component == component and o.recognises(shapes)), None)
    if official is None:
        raise UserError(f"{folder}: a {component} of kind {config.kind!r} has no released layout that is known here")
    return official.name, official.to_official(ours, unused, config), entry


def read_source(path: Path) -> tuple[str, list[str]]:
    """What a converted folder was recognised as, and the entry that it was taken from."""
    source = read_json(path, "convert again")
    with reading(path, "a record of where a model came from", "convert again"):
        name, entry = source["recognised_as"], source["entry"]
        if not (isinstance(name, str) and isinstance(entry, list) and all(isinstance(key, str) for key in entry)):
            raise TypeError("recognised_as is a text, entry a list of texts")
    return name, entry
