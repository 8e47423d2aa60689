"""Networks that transformers reads (extra `text`), from a local folder or the Hugging Face hub."""

from pathlib import Path
from typing import Any

import torch

from consonar.errors import NotHere, UserError, needs, reading
from consonar.files.readers import home_expanded
from consonar.hub import read_name, released_file, released_weights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
"""As transformers saves them; large ones in shards, with an index of this name."""


def find_folder(place: str, where: str, files: tuple[str, ...], known: str = "a folder") -> Path:
    """The folder that `place` names, or that holds the `files` of OWNER/NAME of the hub, which are fetched, weights
    in shards where they are published so; `known`: what on this machine might have been named, for the choices.

    Raises `NotHere` where there is neither, and `UserError` for a folder without the config.json that is one of the
    files.
    """
    folder, choices = home_expanded(place), f"choices: {known}, OWNER/NAME of the hub"
    if folder.is_dir():
        if CONFIG in files and not (folder / CONFIG).is_file():
            raise UserError(f"{where}: the folder {folder} has no {CONFIG}; {choices}")
        return folder
    if place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise NotHere(f"{where}: no folder {folder}; {choices}")
    try:
        found = [
            released_weights(place, file) if file == WEIGHTS else released_file(read_name(f"hf:{place}/{file}"))
            for file in files
        ]
    except UserError as error:
        raise NotHere(f"{where}: no folder {folder}, and {error}; {choices}") from error
    if len({file.parent for file in found}) > 1:
        raise UserError(f"{where}: put {' and '.join(file.name for file in found)} into one folder")
    return found[0].parent


def read_network(loader: str, folder: Path, where: str, **given: object) -> Any:  # of an optional package
    """The frozen network in a folder, float32 on the CPU, read by the class `loader` of transformers with `given`.

    Downloads nothing, and leaves random numbers as they are. `UserError` for files that lack weights.
    """
    with needs(where, "text"):
        import transformers
        from transformers.utils import logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a file may have another half, as CLIP's, which it would list
    logging.disable_progress_bar()
    try:
        with reading(f"{where}: {folder}", "a network that transformers saved"), torch.random.fork_rng([]):
            network, info = getattr(transformers, loader).from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **given
            )
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{where}: {folder} lacks {len(missing)} weights, the first {missing[0]}")
    return network.eval().requires_grad_(False)
