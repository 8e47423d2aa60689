"""Weights in files: .safetensors written and read, and what tensors from outside must be before they are weights.

They must be whole, finite, of the model's names and shapes, and as many as it has layers for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from consonar.errors import UserError, reading
from consonar.files.writers import write_atomically

MAX_REPEATED = 2**30
"""Bytes of a tensor that repeats a smaller storage (`expand`): a file of a kilobyte can claim any number."""


def check_plain(state: Mapping[Any, Tensor], where: str) -> None:
    """`UserError` names the first tensor whose numbers are not all there: sparse, quantized, nested, without memory, or
    a few numbers repeated over more than a gigabyte."""
    for key, value in state.items():
        kinds = {"nested": value.is_nested, "quantized": value.is_quantized, "without memory": value.is_meta}
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
        tensor = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, all of it or nothing."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}

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
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


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


def first_of(keys: Sequence[str], count: int = 8) -> str:
    """The first keys of many, and how many more there are."""
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def check_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """`UserError` lists the keys of `own` that `state` lacks, those it has besides, and those of another shape."""
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"missing {first_of(missing)}")
    if extra := [key for key in state if key not in own]:
        problems.append(f"unknown {first_of(extra)}")
    for key in own:
        if key in state and not isinstance(state[key], Tensor):
            problems.append(f"{key} is a {type(state[key]).__name__}")
        elif key in state and own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}")
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
