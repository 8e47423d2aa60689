"""CUDA graphs on the pretended device: a capture notes the operations and leaves no trace of their results; a replay
does the same operations on the same memory, so that what Python decided at the capture stays decided.

Refused as CUDA refuses it: whatever waits for the device during a capture; the end of a capture that failed fails too,
and leaves the allocator in it: then `empty_cache`, and with it every other capture, is refused until that is ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(values: Any) -> list[Tensor]:
    """Those among the values, also in lists."""
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in tensors_in(value)]
    return [values] if isinstance(values, Tensor) else []


@cache
def changed_by(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operation changes; PyTorch makes its schema anew for all who ask."""
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    return tensors_in([args[place] if place < len(args) else kwargs.get(name) for place, name in changed_by(func)])


def is_launch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether the device does something: not for views and for memory that is only taken."""
    if written(func, args, kwargs):
        return True
    if func._opname.startswith(("empty", "new_empty")):
        return False
    known = {storage_of(tensor) for tensor in tensors_in([*args, *kwargs.values()])}
    return any(storage_of(tensor) not in known for tensor in tensors_in(result))


class Tape:
    """What a capture notes: operations with their tensors on the CPU, and what was in memory before."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.launches = 0
        self.born: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in written(func, args, kwargs):
            if storage_of(tensor) not in self.born | self.before.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[storage_of(tensor)] = whole, whole.clone()

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        known = {storage_of(tensor) for tensor in tensors_in([*args, *kwargs.values()])}
        self.born |= {storage_of(tensor) for tensor in tensors_in(result)} - known - self.before.keys()
        self.operations.append((func, args, kwargs, result))
        self.launches += is_launch(func, args, kwargs, result)

    def undo(self) -> None:
        for whole, saved in self.before.values():
            whole.copy_(saved)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.tape is not None, "a graph without a capture"
        self.replays += 1
        STATE.replayed()
        with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, result in self.tape.operations:
                for old, new in zip(tensors_in(result), tensors_in([func(*args, **kwargs)]), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class State:
    """The tape of the capture that is under way, and all graphs that were made."""

    tape: Tape | None = None
    replayed: Any = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.made: list[Graph] = []
        self.underway: list[Any] = []
        """Pools that the allocator takes memory of captures from."""
        self.uses: Counter[Any] = Counter()
        """Of each pool, captures whose memory it has."""


STATE = State()


def empty_cache() -> None:
    """torch.cuda.empty_cache."""
    if STATE.underway:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


def end_allocate(device: int, pool: Any) -> None:
    """torch._C._cuda_endAllocateToPool."""
    if pool not in STATE.underway:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    STATE.underway.remove(pool)


def release(device: int, pool: Any) -> None:
    """torch._C._cuda_releasePool."""
    assert STATE.uses[pool] > 0, "a pool that no capture has"
    STATE.uses[pool] -= 1


@contextmanager
def capture(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """torch.cuda.graph."""
    assert STATE.tape is None, "a capture inside of another"
    assert capture_error_mode in ("global", "thread_local", "relaxed")
    empty_cache()
    STATE.tape = tape = Tape()
    STATE.underway.append(pool)
    STATE.uses[pool] += 1
    try:
        yield
    except BaseException:
        STATE.tape = None
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
    STATE.tape = None
    end_allocate(0, pool)
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.no_grad():
        tape.undo()
    graph.tape = tape
    STATE.made.append(graph)
