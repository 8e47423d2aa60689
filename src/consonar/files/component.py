"""Component folders: `config.json` + `model.safetensors`, a generator without its heads, a tokenizer or a part of one.

What the configuration means is said one floor above, in `consonar.model_folders`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from torch import Tensor, nn

from consonar.errors import UserError, reading
from consonar.files.readers import read_json
from consonar.files.weights import (
    at_most,
    check_finite,
    check_weights,
    component_fingerprint,
    map_tensors,
    read_tensors,
    save_tensors,
)
from consonar.files.writers import write_atomically
from consonar.json_types import Json

Module = TypeVar("Module", bound=nn.Module)
FORMAT_VERSION = 1
SAVE = "save"
"""Key of the hash of configuration and weights that both files of a component carry."""


def save_component(folder: Path, config: Mapping[str, object], state: Mapping[str, Tensor]) -> None:
    """Writes a component folder: its weights (model.safetensors), which are finite, and last what it is (config.json).

    Both name the save that they are from, so that files of two saves are not taken for a pair. The weights carry the
    configuration as well, so that `finish_save` can complete a save that was ended between the two.
    """
    check_finite(state, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    save = component_fingerprint(config, state)
    text = json.dumps({"format_version": FORMAT_VERSION, **config, SAVE: save}, indent=1) + "\n"
    save_tensors(folder / "model.safetensors", state, {"config": text})
    write_atomically(folder / "config.json", lambda path: path.write_text(text))


def saved_with(folder: Path) -> tuple[str | None, str]:
    """The hash of the save that wrote the weights of a component folder, and the text of the config.json beside them.

    None and nothing for weights of other makers and older versions. One entry of metadata holds both, since
    safetensors writes several in any order.
    """
    path = folder / "model.safetensors"
    with reading(path, "a .safetensors file"), safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("config", "")
        config = json.loads(text) if text else {}
    return config.get(SAVE) if isinstance(config, dict) else None, text


def finish_save(folder: Path) -> None:
    """Writes the config.json that belongs to the weights, where the process ended after it wrote these.

    For a folder that this process holds. Does nothing where there are no weights, no configuration in them, or where
    they are damaged: who reads them says so, and a run that is resumed writes them again.
    """
    if not (folder / "model.safetensors").is_file():
        return
    try:
        (save, text), path = saved_with(folder), folder / "config.json"
    except UserError:
        return
    if save is not None and not (path.is_file() and str(save).encode() in path.read_bytes()):
        write_atomically(path, lambda partial: partial.write_text(text))


def is_component(folder: Path) -> bool:
    """Whether a component was written here completely."""
    try:
        component_config(folder)
    except UserError:
        return False
    return True


def released(path: Path, what: str) -> Path:
    """The component folder that `path` means: `model` inside a run folder, or itself.

    Raises `UserError`, which begins with `what`, for a run that has no model yet.
    """
    if (path / "model" / "config.json").is_file():  # written last
        return path / "model"
    if (path / "metrics.jsonl").exists():
        raise UserError(
            f"{what}: the run in {path} has not finished (no model folder); go on with: consonar train ... --resume"
        )
    return path


def component_config(folder: Path) -> Json:
    """config.json of a component folder, without its format version; `UserError` for a damaged or newer one."""
    config_path = folder / "config.json"
    for path in (config_path, folder / "model.safetensors"):
        if not path.is_file():
            raise UserError(f"{folder}: no {path.name}; a model folder holds config.json and model.safetensors")
    config = read_json(config_path)
    save, (known, _) = config.pop(SAVE, None), saved_with(folder)
    if save is not None and known is not None and save != known:
        raise UserError(
            f"{folder}: config.json and model.safetensors are from different saves; copy both from one folder (a run "
            "that was ended while it wrote them mends them when it is resumed)"
        )
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{config_path}: format_version {version!r}; this consonar reads {FORMAT_VERSION}")
    return config


def read_component(folder: Path) -> tuple[Json, dict[str, Tensor]]:
    """config.json and the mapped weights of a component folder; `UserError` for a missing, damaged or newer one."""
    return component_config(folder), map_tensors(folder / "model.safetensors")


def load_module(build: Callable[[], Module], folder: Path) -> Module:
    """The module that `build` makes, with the weights of a component folder, in evaluation mode and frozen.

    The module is built without memory and is given each tensor as it is read, so that the peak is one copy of the
    weights. They are read, not mapped: a file that is replaced meanwhile changes nothing.
    """
    path = folder / "model.safetensors"
    mapped = map_tensors(path)
    with torch.device("meta"), at_most(10 * len(mapped) + 1000, f"{folder / 'config.json'}: more layers than weights"):
        try:
            module = build()
        except RuntimeError as error:  # without memory, sizes that no memory has are all that can go wrong
            raise UserError(f"{folder / 'config.json'}: no model has these sizes ({error})") from error
    own = module.state_dict()
    check_weights(own, mapped, str(folder))
    module.load_state_dict(read_tensors(path, mapped, own), assign=True)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not left, f"{type(module).__name__}: not in its state dict, so without a value: {left}"
    return module.eval().requires_grad_(False)
