"""Tensors in shards (DTensor) in a folder: each process writes its own, others read them as they hold them.

The folder is one of torch.distributed.checkpoint. Beside `distributed` and `parallel` this is the one file that imports
`torch.distributed`: those train, this reads and writes, and is needed by who reads a folder without any other process.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.futures import Future

from consonar.files.readers import beside, check_archive

METADATA = ".metadata"
NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip
"""What a description of shards is made of, by module: nothing else is looked up."""
Place = Callable[[str], Tensor | None]
"""The tensor of a run that holds what has this name in a checkpoint, where there is one."""


class Description(pickle.Unpickler):
    """Reads the file `METADATA` without executing anything in it."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.removesuffix("._local")  # where Python 3.13 has the classes of pathlib
        if name not in NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class Writer(FileSystemWriter):
    """Reads back what this process wrote; ValueError where the checksums are others."""

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        written = super().write_data(plan, planner)
        check(Path(self.path), (result.storage_data for result in written.value()))
        return written


class Reader(FileSystemReader):
    """Reads nothing that is not what its checksum says, or no tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = Description(file).load()
        if not all(isinstance(each, TensorStorageMetadata) for each in metadata.state_dict_metadata.values()):
            raise ValueError("it describes something that is no tensor")
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        check(Path(self.path), (self.storage_data[item.storage_index] for item in plan.items))
        return super().read_data(plan, planner)


def check(folder: Path, pieces: Iterable[Any]) -> None:
    """Raises ValueError where a piece of a file is not what its checksum says, or is no archive of PyTorch."""
    for piece in pieces:
        with (folder / beside(folder, piece.relative_path)).open("rb") as file:
            file.seek(piece.offset)
            check_archive(io.BytesIO(file.read(piece.length)))


@contextmanager
def first_failure() -> Iterator[None]:
    """What failed in a process is raised by all, instead of a table of it."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def own_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """All processes, for a thread of each: what they say to each other there goes its own way. All at once. `timeout`:
    how long one waits for another."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert group is not None  # all are in it
    return group


def copied(tensor: Tensor) -> Tensor:
    """A copy of a tensor, or of this process's shard of it, on the CPU."""
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device="cpu").copy_(tensor)
    copy: Tensor = BlockingAsyncStager().stage({"": tensor})[""]
    return copy


def map_named(function: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """`function` of every tensor and its name in tables in each other, such as optimizer/state/0/exp_avg."""
    if isinstance(value, dict):
        return {key: map_named(function, part, f"{name}/{key}".lstrip("/")) for key, part in value.items()}
    return function(name, value) if isinstance(value, Tensor) else value


def parted(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The payload with a tensor without memory for each one in shards; and those, by name."""
    found: dict[str, Tensor] = {}

    def taken(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        found[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_named(taken, dict(payload)), found


def write(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Writes and reads back this process's shards; returns when all have. What fails in one of them fails in all."""
    with first_failure():
        save(tensors, storage_writer=Writer(folder), process_group=group)


def read(folder: Path, payload: dict[str, Any], place: Place) -> dict[str, Any]:
    """The payload with the tensors that it has without memory: in shards as those of `place`, else whole."""
    found: dict[str, Tensor] = {}

    def made(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        own = place(name)
        if isinstance(own, DTensor) and own.shape == tensor.shape:
            found[name] = torch.empty_like(own, dtype=tensor.dtype)
        else:
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return found[name]

    filled: dict[str, Any] = map_named(made, payload)
    with first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no process needs another one to read
        load(found, storage_reader=Reader(folder), no_dist=True)
    return filled
