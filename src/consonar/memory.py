"""Memory: what is free; and when it is not enough, where it went, by part, and what to change, noted on the error."""

import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from consonar.attention import KVCache
from consonar.errors import is_out_of_memory

GIB = 2**30
GROUP_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""File of the limit of a control group of Linux, of version 2 and of version 1."""


@contextmanager
def explained(change: str, device: torch.device, extra: Mapping[str, Iterable[Tensor]] | None = None) -> Iterator[None]:
    """Inside, an error for want of memory is raised on with a note: what was in use on `device`, and what to change.

    `change` names settings with their values. `extra` are tensors by part that `parts_in_use` does not know of.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            parts = parts_in_use(device) | {name: size_of(tensors, device) for name, tensors in (extra or {}).items()}
            error.add_note(f"{account(parts, bytes_in_use(device))}; {change}")
        raise


def account(parts: Mapping[str, int], total: int) -> str:
    """In words, where `total` bytes went, from those of each part: what is in none of them is activations and the rest.

    Where parts were counted that are not in the total (a tensor that nothing has written to yet), nothing is left over.
    """
    known = sum(parts.values())
    sizes = {**parts, "activations and the rest": max(0, total - known)}
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    return f"{max(total, known) / GIB:.2f} GiB in use: {listed}"


def bytes_in_use(device: torch.device) -> int:
    """Of tensors on a GPU; of the whole process on a CPU, where the system tells it, else 0."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    told = status.read_text().splitlines() if status.exists() else []
    return sum(int(text.split()[1]) * 1024 for text in told if text.startswith("VmRSS"))


def bytes_free(device: torch.device) -> int:
    """Of a GPU's memory, what tensors may still take: what is nobody's, and what PyTorch keeps for such."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_of_machine() -> int:
    """What all processes may take here: the machine's memory, or what a control group that this process is in (a
    container's, a job's) may take, where that is less; 0 where nothing is told."""
    told = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    return min([*told, *limits_of_groups()], default=0)


def limits_of_groups(root: Path = Path("/")) -> Iterator[int]:
    """Of each control group of Linux, of either version, that this process is in; what cannot be read tells nothing.
    `root`: where the system's files lie."""
    with suppress(OSError):
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for kind, path in ((kind, path) for _, kinds, path in groups for kind in kinds.split(",")):
            top = root / "sys/fs/cgroup" / kind
            place = top / path.lstrip("/")
            for folder in (place, *place.parents) if kind in GROUP_LIMITS else ():
                limit = folder / GROUP_LIMITS[kind]
                if folder.is_relative_to(top) and limit.is_file() and limit.read_text().strip().isdecimal():  # or max
                    yield int(limit.read_text())


def parts_in_use(device: torch.device) -> dict[str, int]:
    """Bytes on `device` of weights, gradients, optimizer and caches, of whatever is alive.

    The objects are asked of the garbage collector: an error may come from any depth, where nobody holds them all.
    """
    alive = gc.get_objects()
    # `type`, not `isinstance`: what stands for another object would be asked for it, and may be gone.
    modules = [found for found in alive if issubclass(type(found), nn.Module)]
    optimizers = [found for found in alive if issubclass(type(found), torch.optim.Optimizer)]
    # One that is being made, as where memory ends, has none of these yet.
    kept = [vars(module).get(kind, {}) for module in modules for kind in ("_parameters", "_buffers")]
    held = [w for named in kept for w in named.values()]
    weights = [w for w in held if w is not None]
    trained = {id(w) for optimizer in optimizers for group in optimizer.param_groups for w in group["params"]}
    states = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    tensors = {
        "weights": [w for w in weights if id(w) in trained or not optimizers],
        "gradients": [w.grad for w in weights if w.grad is not None],
        "optimizer": [value for entry in states for value in entry.values() if isinstance(value, Tensor)],
        "frozen models": [w for w in weights if optimizers and id(w) not in trained],
        "key-value cache": [found.data for found in alive if issubclass(type(found), KVCache)],
    }
    return {name: size_of(found, device) for name, found in tensors.items()}


def size_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of memory behind those of the tensors that are on a device of this type; shared memory counts once."""
    # Of a tensor in shards, what this process holds.
    parts = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if tensor.device.type == device.type]
    stores = [part.untyped_storage() for part in parts]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())
