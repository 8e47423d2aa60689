"""Weights in files: component folders, .safetensors, and what tensors from outside must be before they are weights.

They must be whole, finite, of the model's names and shapes, and as many as it has layers for. A component folder holds
`config.json` + `model.safetensors`, a generator without its heads, a tokenizer or a part of one; what the configuration
means is said above, in `consonar.model_folders`.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from consonar.errors import NotHere, UserError, reading
from consonar.files.readers import read_json
from consonar.files.writers import write_atomically
from consonar.json_types import Json
from consonar.types import Weights

Module = TypeVar("Module", bound=Weights)
FORMAT_VERSION = 1
SAVE = "save"
"""Key of the hash of configuration and weights that both files of a component carry."""
MAX_REPEATED = 2**30
"""Bytes of a tensor that repeats a smaller storage (`expand`): a file of a kilobyte can claim any number."""


def check_plain(state: Mapping[str, Tensor], where: str) -> None:
    """`UserError` names the first tensor whose numbers are not all there: sparse, quantized, nested, without memory, or
    a few numbers repeated over more than a gigabyte."""
    for key, value in state.items():
        kinds = {
            "complex": value.is_complex(),
            "nested": value.is_nested,
            "quantized": value.is_quantized,
            "without memory": value.is_meta,
        }
        kind = next((kind for kind in kinds if kinds[kind]), str(value.layout).removeprefix("torch."))
        if kind != "strided" or value.nbytes > max(MAX_REPEATED, value.untyped_storage().nbytes()):
            shape = "" if value.is_nested else f", shape {tuple(value.shape)}"
            raise UserError(f"{where}: {key} is not a plain tensor ({kind}{shape}); save it as one, with all numbers")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """`UserError` names the first weights that hold NaN or infinity, which make a picture of one token."""
    for key, value in state.items():
        if value.is_floating_point() and value.itemsize > 1 and value.numel() and not value.is_meta:
            low, high = value.detach().aminmax()  # NaN passes through both; needs no copy, as `isfinite` does
            if not (low.isfinite() and high.isfinite()):
                raise UserError(
                    f"{where}: {key} holds numbers that are not finite ({float(low)}); the file is damaged, or comes "
                    "from a training that diverged"
                )


@contextmanager
def at_most(count: int, message: str) -> Iterator[None]:
    """Raises `UserError` when modules get more than `count` weights inside the block: a million layers take hours."""
    seen = itertools.count(1)

    def registered(*_: object) -> None:
        if next(seen) > count:
            raise UserError(f"{message} in the file")

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def component_fingerprint(config: Mapping[str, object], state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a configuration and weights, the same whatever file or dtype they were stored in."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].detach()
        tensor = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, all of it or nothing; weights that go by two names (ties) are in it twice."""
    tensors, seen = {}, set()
    for key, value in state.items():
        tensors[key] = value.detach().cpu().contiguous()
        place = tensors[key].untyped_storage().data_ptr()
        if place in seen:  # the format has no memory that two share
            tensors[key] = tensors[key].clone()
        seen.add(place)

    def save(partial: Path) -> None:
        # safetensors makes its file for the owner alone; give it the mode of any new file here (umask, inherited ACL).
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        safetensors.torch.save_file(tensors, partial, metadata)
        partial.chmod(mode)

    write_atomically(path, save)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped: read from the disk when used, and gone when the file changes."""
    with reading(path, "a .safetensors file"), safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_tensors(path: Path, mapped: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file in memory of their own, with the types of `like`.

    `mapped` is what `map_tensors` found, so the file is known to be well-formed. Its pages are not touched here: those
    of a mapped file that were read count as memory too.
    """
    tensors = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for key in mapped:
            tensor = torch.empty(mapped[key].shape, dtype=mapped[key].dtype)
            file.seek(8 + size + header[key]["data_offsets"][0])
            if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise UserError(f"{path}: cut short while it was read")
            tensors[key] = tensor.to(like[key].dtype)
    check_finite(tensors, str(path))
    return tensors


def check_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """`UserError` lists the keys of `own` that `state` lacks, those it has besides, those of another shape, and whole
    numbers where fractions are meant (quantized weights, whose scale is elsewhere) or the reverse."""
    problems = []
    lists = {"missing": [key for key in own if key not in state], "unknown": [key for key in state if key not in own]}
    for kind, keys in lists.items():
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            problems.append(f"{kind} {', '.join(keys[:8])}{more}")
    for key in own:
        if key in state and not isinstance(state[key], Tensor):
            problems.append(f"{key} is a {type(state[key]).__name__}")
        elif key in state and own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}")
        elif key in state and own[key].is_floating_point() != state[key].is_floating_point():
            problems.append(f"{key} is {state[key].dtype}, the model has {own[key].dtype}")
    if problems:
        raise UserError(f"{where}: not the weights of this model: {'; '.join(problems[:4])}")


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies exactly these weights into a module; `UserError` lists what is missing, unknown or of another shape, and
    names what is not finite."""
    own = module.state_dict()
    check_weights(own, state, where)
    cast = {key: value.to(own[key].dtype) for key, value in state.items()}
    check_finite(cast, where)
    module.load_state_dict(cast)


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
    try:
        (save, text), path = saved_with(folder), folder / "config.json"
    except UserError:
        return
    if save is not None and not (path.is_file() and str(save).encode() in path.read_bytes()):
        write_atomically(path, lambda partial: partial.write_text(text))


def is_component(folder: Path) -> bool:
    """Whether a component was written here completely."""
    with suppress(UserError):
        component_config(folder)
        return True
    return False


def released(path: Path, what: str) -> Path:
    """The component folder that `path` means: `model` inside a run folder, or itself. `NotHere`, which begins with
    `what`, for a run that has no model yet."""
    if (path / "model" / "config.json").is_file():  # written last
        return path / "model"
    if (path / "metrics.jsonl").exists():
        raise NotHere(
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


def of_package(kind: object) -> bool:
    """Whether a class, or what makes a model, is of this package, and not a user's own (docs/own-models.md)."""
    return str(getattr(kind, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def load_module(build: Callable[[], Module], folder: Path, *, lean: bool = True) -> Module:
    """The module that `build` makes, with the weights of a component folder, in evaluation mode and frozen.

    A `lean` one is built without memory and is given each tensor as it is read, so that the peak is one copy of the
    weights; models of others may hold numbers besides and ties, which need the memory. Weights are read, not mapped: a
    file that is replaced meanwhile changes nothing.
    """
    path = folder / "model.safetensors"
    mapped = map_tensors(path)
    few = at_most(10 * len(mapped) + 1000, f"{folder / 'config.json'}: more layers than weights")
    with torch.device("meta" if lean else "cpu"), few, torch.random.fork_rng(devices=[]):
        try:
            module = build()
        except RuntimeError as error:  # without memory, sizes that no memory has are all that can go wrong
            raise UserError(f"{folder / 'config.json'}: no model has these sizes ({error})") from error
    own = module.state_dict()
    check_weights(own, mapped, str(folder))
    module.load_state_dict(read_tensors(path, mapped, own), assign=lean)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not left, f"{type(module).__name__}: not in its state dict, so without a value: {left}"
    return module.eval().requires_grad_(False)
