"""Model folders: which ones are shipped, what their configuration means, and tokenizers read from them.

What else a name or an `hf:` text means, and generators, stand above the converter, in `consonar.components`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from consonar.config_io import from_dict
from consonar.errors import UserError, no_folder, unknown
from consonar.files.weights import component_config, load_module, of_package, released
from consonar.networks import prompts
from consonar.origin import Origin
from consonar.tokenizers import TOKENIZERS, resized
from consonar.tokenizers.base import CodebookTokenizer
from consonar.tokenizers.checked import checked_tokenizer
from consonar.types import Kind, ModelConfig

SHIPPED = {
    "generator": ("openmoji",),
    "tokenizer": ("openmoji-64", "openmoji-64-f4", "cifar10-32", "scenes-64", "scenes-64-f4"),
}
"""Models whose weights are part of the package."""
PACKAGE = Path(__file__).parent
Config = TypeVar("Config", bound=ModelConfig)
Model = TypeVar("Model")


def from_anywhere(what: str, name: str) -> str:
    """The name of a model, shipped or `hf:`; a folder as a whole path, which works from any directory."""
    return name if name in SHIPPED[what] or name.startswith("hf:") else str(Path(name).resolve())


def shipped_or_folder(what: str, name: str | Path, key: str | None = None) -> Path:
    """The folder of a shipped model or of a run, or the path itself; `what` is `generator` or `tokenizer`. `UserError`,
    which begins with `key` (None: `what`), for a name that is neither shipped nor a folder, and for a run that has no
    model yet."""
    if isinstance(name, str) and name in SHIPPED[what]:  # a `Path` is a folder: `Path("./openmoji")` has lost its dot
        return PACKAGE / f"{what}s" / "pretrained" / name
    if not str(name) or not Path(name).is_dir():  # an empty name would be the working directory
        raise no_folder(key or what, name, [*SHIPPED[what], "a run folder", "a model folder", "hf:NAME"])
    return released(Path(name), what)


def read_settings(
    folder: Path, what: str, kinds: Mapping[str, Kind[Config, Model]]
) -> tuple[str, Origin, Config, Callable[..., Model]]:
    """What config.json says: name, origin, shape as its dataclass, and the class of the model. `UserError` for a folder
    of something else than `what`, and for a kind that is not in the table."""
    config, where = component_config(folder), str(folder / "config.json")
    if (component := config.pop("component", None)) != what:
        raise UserError(f"{what}: {folder} is not a {what} folder (component in config.json: {component!r})")
    name, kind = config.pop("name", folder.name), config.get("kind")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: name is {name!r}, expected a text")
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown(f"{folder}: kind", kind, kinds)
    made = {field.name: config.pop(field.name) for field in fields(Origin) if field.name in config}
    return name, from_dict(made, where, Origin), from_dict(config, where, kinds[kind].config), kinds[kind].model


def own_text_encoder(folder: Path, origin: Origin) -> str | None:
    """Name or folder of what reads the captions of the generator in a model folder: the folder itself where the words
    of its vocabulary lie in it, else what it was made with; None where neither is known."""
    return str(folder.resolve()) if (folder / prompts.FILE).is_file() else origin.text_encoder


def read_tokenizer(folder: Path, num_tokens: int | None = None) -> CodebookTokenizer:
    """The tokenizer of a model folder, as `components.load_tokenizer` returns it."""
    name, _, settings, tokenizer_class = read_settings(folder, "tokenizer", TOKENIZERS)
    if num_tokens is not None:
        settings = resized(settings, num_tokens)
    lean = of_package(tokenizer_class)
    return checked_tokenizer(load_module(lambda: tokenizer_class(settings, name=name), folder, lean=lean), str(folder))
