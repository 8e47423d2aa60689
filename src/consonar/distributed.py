"""Processes and devices: start, reduce. How they hold a model: `parallel`. One process needs neither."""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions have the group of all processes as their default. Imported while there is one, as what draws does, they
# would keep it, and with it gloo's threads, until the interpreter ends under them, which can abort.
import torch.distributed.nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from consonar.cpu.timing import processor
from consonar.errors import UserError, check_choice
from consonar.seeding import rows_of_rank

Value = TypeVar("Value")
Item = TypeVar("Item")
DEVICES = ("auto", "cpu", "cuda")
TIMEOUT = "CONSONAR_TIMEOUT"
"""The variable that says how many seconds a process waits for the others; PyTorch's own time without: 30 minutes, of
CUDA devices 10. Of work that processes share, for how long it sees no sign that another gets on."""
LATE = 2.0
"""Seconds by which others may notice later that one of them is missing."""
LAST_TENSORS = 0.1
"""Seconds for gloo's threads to free what was exchanged last. They hold gloo's lock and ask for Python's; whoever frees
the group, as one that wraps a model may do once it is destroyed, holds Python's and asks for gloo's: both would wait
for ever, which was seen once on a busy machine (torch 2.13)."""


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_rows(self, draw: Callable[[int], torch.Tensor], num_rows: int) -> torch.Tensor:
        """This process's rows of a draw for the batch of all of them, see `seeding.rows_of_rank`."""
        return rows_of_rank(draw, num_rows, self.rank, self.size)


ALONE = World(0, 1, torch.device("cpu"))


def pick_device(name: str = "auto", key: str = "loop.device") -> torch.device:
    """`auto` is CUDA when there is one, else the CPU. Raises `UserError`, about `key`, for a device that is not there.

    What it multiplies in is decided by `consonar.precision`.
    """
    check_choice(key, name, DEVICES)
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError(f"{key}: 'cuda', but PyTorch sees no CUDA device; choices: auto, cpu")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def beside(device: torch.device, *read: torch.Tensor) -> Iterator[None]:
    """What is asked of a CUDA device inside begins when what was asked before is done, and runs while it does what is
    asked after; it may read the tensors `read`, and its own. On a CPU it is done at once."""
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    for tensor in read:
        tensor.record_stream(stream)  # its memory is not given to others before that


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: the memory of what runs in it is kept for it."""
    return torch.cuda.Stream(device)


def one_ahead_beside(
    work: Callable[[torch.Tensor], torch.Tensor], parts: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """`work` of each of the parts. On a CUDA device the next one's runs beside what is asked with this one, and begins
    when what was asked with the one before is done, so that memory is taken for two; elsewhere, and of one part, in
    turn."""
    device = parts[0].device
    if device.type != "cuda" or len(parts) == 1:
        yield from map(work, parts)
        return
    here, stream = torch.cuda.current_stream(device), side_stream(device)

    def begun(part: torch.Tensor) -> torch.Tensor:
        with beside(device, part):
            return work(part)

    def done(made: torch.Tensor) -> torch.Tensor:
        here.wait_stream(stream)
        made.record_stream(here)
        return made

    ahead = begun(parts[0])
    for part in parts[1:]:
        made = done(ahead)
        ahead = begun(part)
        yield made
    yield done(ahead)


def machine_name(device: torch.device | str) -> str:
    """The accelerator's name, or the processor's for the CPU."""
    if torch.device(device).type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    return processor()


@contextmanager
def joined(device_name: str = "auto", key: str = "loop.device") -> Iterator[World]:
    """Inside of it this process is one of those that torchrun describes (NCCL on CUDA, gloo elsewhere), or alone.

    A lone one that torchrun started is a group too, over which a model may be sharded. Raises as `pick_device`, and
    `UserError` that names the processes which ended, or for which the others waited in vain (`TIMEOUT`).
    """
    device = pick_device(device_name, key)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_torchelastic_launched():
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience())
    store.set(f"process {rank}", f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield World(rank, size, device)
    except RuntimeError as error:
        if not re.search(r"gloo|NCCL|ProcessGroup|TCPStore", str(error)):
            raise
        raise UserError(
            f"rank {rank}: {missing(store, rank, size)}; the same command goes on (train: --resume)"
        ) from error
    finally:
        if backend == "gloo":
            time.sleep(LAST_TENSORS)
        dist.destroy_process_group()


def patience() -> timedelta | None:
    """How long to wait for other processes; `UserError` for a variable that is no number of seconds."""
    said = os.environ.get(TIMEOUT)
    if said is None:
        return None
    if not said.isdecimal() or int(said) == 0:
        raise UserError(f"{TIMEOUT}: {said!r} is not a whole number of seconds, 1 or more")
    return timedelta(seconds=int(said))


def seconds_of_patience() -> float:
    """The same of processes that meet in files alone; without a time of the user's gloo's."""
    return (patience() or default_pg_timeout).total_seconds()


def missing(store: Any, rank: int, size: int) -> str:
    """Which of the processes have not noticed, as this one has, that one is missing. PyTorch exports no type of a
    store."""
    try:
        store.set(f"noticed {rank}", "")
        time.sleep(LATE)
        silent = [other for other in range(size) if not store.check([f"noticed {other}"])]
        named = [f"rank {other} ({store.get(f'process {other}').decode()})" for other in silent]
    except RuntimeError:  # it ended with the process that held it
        named = ["rank 0"]
    return f"{' and '.join(named) or 'another process'} has ended, or does not answer ({TIMEOUT} says how long to wait)"


def mean_over_ranks(values: dict[str, float], world: World) -> dict[str, float]:
    """Averages every value over the processes; all processes pass the same keys."""
    if world.size == 1:
        return values
    sums = sum_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64, device=world.device), world)
    return dict(zip(values, (sums / world.size).tolist(), strict=True))


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """The elementwise sum over the processes; the tensor itself in a world of one."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def rows_of_all(values: torch.Tensor, world: World) -> torch.Tensor:
    """The rows of all processes, which have equally many, in the order that one process has: `rows_of_rank` undone."""
    if world.size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def from_main(value: Value, world: World) -> Value:
    """The `value` of rank 0 (anything that can be pickled) in every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, device=world.device)
    return box[0]


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def of_every(value: Value, world: World, *, failed: bool = False) -> list[Value]:
    """The `value` of every process (anything that can be pickled, on the CPU), by rank.

    Where others `failed`, the process ends with status 2; it is silent, for the first of those tells why.
    """
    if world.size == 1:
        return [value]
    found: list[tuple[Value, bool]] = [(value, failed)] * world.size
    dist.all_gather_object(found, (value, failed))
    first = next((rank for rank, (_, bad) in enumerate(found) if bad), world.rank)
    if first != world.rank:
        sys.exit(2)
    return [one for one, _ in found]


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Around what processes do that exchange by `of_every` alone: what ends one of them ends all, and one tells why."""
    try:
        yield
    except Exception:
        of_every(None, world, failed=True)
        raise
    of_every(None, world)  # who fails last of all, too, finds the others here


def in_turn(work: Callable[[Item], Value], items: Iterable[Item], world: World) -> Iterator[Value]:
    """`work` of every item, in their order, in every process; each does one of as many as there are processes."""
    left = iter(items)
    while group := list(islice(left, world.size)):
        mine = [work(item) for item in group[world.rank : world.rank + 1]]
        yield from (one for found in of_every(mine, world) for one in found)
