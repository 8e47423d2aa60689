"""Reading released weight files: what a file is by its first bytes, its tensors mapped, nothing in it executed.

Files come as PyTorch archives (.pt, .pth, .bin; also the old format before archives), as .safetensors, as shards with
an index, bare or inside an entry of a training checkpoint, maybe with the prefixes that DistributedDataParallel and
`torch.compile` put before keys. Tensors are mapped where the format allows: only what is used is read from the disk.
"""

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from consonar.convert.layouts.official import State
from consonar.errors import UserError, reading, unknown
from consonar.files.readers import check_archive
from consonar.files.weights import check_plain, map_tensors
from consonar.files.writers import file_sha256
from consonar.hub import read_index
from consonar.json_types import Json

ENTRIES = ("model", "module", "state_dict", "model_state_dict", "ema")
"""Where training checkpoints keep the weights; the first that is there counts (DDP, DeepSpeed, Lightning, others)."""
DEEPEST = 8
"""Entries in each other before the tensors come; a pickle can hold itself, which has no end."""
PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put before the keys of a module: DistributedDataParallel, `torch.compile` (also of single blocks)."""
WEIGHT_NAMES = (
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin"
)  # fmt: skip
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Weights:
    """The tensors of a file or of a set of shards."""

    tensors: State
    files: tuple[Path, ...]
    """What was read: one file, or the shards."""
    entry: tuple[str, ...] = ()
    """Path of the entry that held the tensors; empty for a bare state dict."""
    ignored: tuple[str, ...] = ()
    """Entries beside it that were left alone: optimizer, steps, arguments."""
    prefix: str = ""
    """What stood before every key."""

    @property
    def notes(self) -> list[str]:
        """What a user is told about it."""
        notes = [f"from its entry {'/'.join(self.entry)!r}"] if self.entry else []
        return [*notes, f"left alone beside it: {', '.join(self.ignored[:6])}"] if self.ignored else notes

    @cached_property
    def source(self) -> Json:
        """What is written down about it, with the hashes of its files."""
        return {
            "files": {file.name: file_sha256(file) for file in self.files},
            "entry": list(self.entry),
            "ignored_entries": list(self.ignored),
            "prefix": self.prefix,
        }


def read_weights(path: Path, entry: str | None = None) -> Weights:
    """The tensors of a weight file, an index of shards, or a folder that holds one of either.

    `entry` names the part of a training checkpoint to take, e.g. "ema". Raises `UserError`, in one line, for what is
    missing, damaged, cut short, named as something else than it is, or holds Python objects; executes nothing.
    """
    if path.is_dir():
        inside = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        if not inside:
            raise UserError(f"{path}: none of {', '.join(WEIGHT_NAMES)} in it; name the weight file itself")
        path = inside[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        return without_prefix(replace(unwrap(read_file(path), path, entry), files=(path,)))
    if entry is not None:
        raise UserError(f"--entry: {path} is a set of shards, which has no entries; leave --entry away")
    return without_prefix(read_shards(path))


def read_file(path: Path) -> Mapping[str, object]:
    """What one file holds: tensors by key, or for a PyTorch file whatever was saved."""
    found = what_it_is(path)
    if found == ".safetensors":
        if path.suffix in TORCH_ENDINGS:
            raise UserError(f"{path}: holds .safetensors, not what PyTorch saves; rename it to .safetensors")
        return map_tensors(path)
    if not found.startswith("PyTorch"):
        raise UserError(f"{path}: not a weight file: it is {found}")
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: holds a {found}, not .safetensors; rename it to .pt if you trust its source")
    return read_torch(path, mapped=found == "PyTorch archive")


def what_it_is(path: Path) -> str:
    """ ".safetensors", "PyTorch archive", "PyTorch file of the old format", or in words what it is instead."""
    with reading(path, "a weight file"), path.open("rb") as file:
        start, size = file.read(1024), os.fstat(file.fileno()).st_size
    if not start:
        return "empty; download it again"
    if start.startswith(b"PK\x03\x04"):
        return "PyTorch archive"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "PyTorch file of the old format"
    if start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if header + 8 <= size:
            return ".safetensors"
        return f"a .safetensors file cut short ({size} bytes, its header alone says {header + 8}); download it again"
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, which names the file and is not it; fetch it with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page; download the file itself, not the page that shows it"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "text"
    if not any(start):
        return "zeros: a download that was not finished"
    return "neither .safetensors nor anything that PyTorch saves"


def read_torch(path: Path, *, mapped: bool) -> Mapping[str, object]:
    """What `torch.save` put into a file, tensors mapped if the format allows; executes nothing."""
    try:
        # Arguments of a training run; a Namespace is a record without behaviour.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old and foreign pickles; what matters about them is raised
            if zipfile.is_zipfile(path):
                check_archive(path)
            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # Damaged bytes raise whatever they happen to spell: errors of the archive, of the pickle, of Python's own types.
    except Exception as error:
        message = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", message):
            raise UserError(
                f"{path}: holds Python objects ({found[1] or found[2]}), not tensors alone; reading them could run "
                "code, so nothing was read. Save its tensors alone, where it comes from"
            ) from error
        raise UserError(
            f"{path}: damaged, cut short, or not saved by torch.save ({type(error).__name__}); download it again"
        ) from error
    if not isinstance(payload, Mapping):
        raise UserError(f"{path}: holds a {type(payload).__name__}, expected tensors by name")
    return payload


def unwrap(payload: Mapping[str, object], path: Path, entry: str | None) -> Weights:
    """The state dict in a file: the file itself, or one entry of a training checkpoint."""
    names: tuple[str, ...] = ()
    ignored: list[str] = []
    if entry is not None and not holds_tensors(payload.get(entry)):
        raise unknown(f"{path}: --entry", entry, [key for key in payload if holds_tensors(payload[key])])
    while True:
        inside = {name: part for name in ((entry,) if entry else ENTRIES) if holds_tensors(part := payload.get(name))}
        name = next(iter(inside), None)
        if name is None:
            break
        if len(names) == DEEPEST:
            raise UserError(f"{path}: over {DEEPEST} entries in each other, or one that holds itself: {name}")
        ignored += [str(key) for key in payload if key != name]
        names, payload, entry = (*names, name), inside[name], None
    found = {key: value for key, value in payload.items() if isinstance(value, Tensor)}
    check_plain(found, str(path))
    tensors = {key: own_storage(value) for key, value in found.items()}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        held = ", ".join(repr(str(key)) for key in list(payload)[:6])
        raise UserError(f"{path}: no tensors by name in it; it holds {held or 'nothing'}")
    ignored += [str(key) for key in payload if key not in tensors]
    return Weights(tensors, (), names, tuple(ignored))


def holds_tensors(value: object, depth: int = 0) -> TypeGuard[Mapping[str, object]]:
    """Whether it is a table with tensors in it, or in one of the entries of it."""
    return isinstance(value, Mapping) and any(
        isinstance(item, Tensor) or (key in ENTRIES and depth < DEEPEST and holds_tensors(item, depth + 1))
        for key, item in value.items()
    )


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of it when it is a part of a larger storage: .safetensors stores no views."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def without_prefix(weights: Weights) -> Weights:
    """The same with keys as the module alone has them.

    Raises `UserError` for two keys that become one and hold different weights.
    """
    prefix = ""
    while found := [p for p in PREFIXES if all(key.startswith(prefix + p) for key in weights.tensors)]:
        prefix += found[0]
    known: dict[str, str] = {}
    for key, value in weights.tensors.items():
        first = known.setdefault(bare(key), key)
        if first != key and not torch.equal(weights.tensors[first], value):
            raise UserError(
                f"{weights.files[0]}: holds {first!r} and {key!r}, which are one weight with two values; "
                "keep the one that is meant"
            )
    return replace(weights, tensors={plain: weights.tensors[key] for plain, key in known.items()}, prefix=prefix)


def bare(key: str) -> str:
    """A key without what wrappers put into it, at its start or inside."""
    for prefix in PREFIXES:
        key = key.replace(f".{prefix}", ".")
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key


def read_shards(index: Path) -> Weights:
    """The tensors that an index distributes over files beside it."""
    places = read_index(index)
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index}: {len(missing)} of {len(names)} shards are not beside it: {', '.join(missing[:4])}")
    files = tuple(index.parent / name for name in names)
    tensors: State = {}
    for file in files:
        tensors |= unwrap(read_file(file), file, None).tensors
    if wrong := sorted(set(places) ^ set(tensors)):
        raise UserError(f"{index}: index and shards do not hold the same keys: {', '.join(wrong[:4])}")
    return Weights(tensors, (index, *files))
