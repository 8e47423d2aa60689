"""The only file that knows about processes and devices: start, wrap, reduce. One process needs none of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from consonar.errors import UserError, check_choice
from consonar.seeding import rows_of_rank

Value = TypeVar("Value")
Module = TypeVar("Module", bound=nn.Module)
DEVICES = ("auto", "cpu", "cuda")


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

    On CUDA, float32 then means float32: cuDNN's convolutions would otherwise run in TF32, with 10 bits of precision,
    and give 3 in 100 pictures another token than the CPU does. Speed is what bf16 is for.
    """
    check_choice(key, name, DEVICES)
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError(f"{key}: 'cuda', but PyTorch sees no CUDA device; choices: auto, cpu")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(device_name: str = "auto") -> Iterator[World]:
    """Inside of it this process is one of those that torchrun describes (NCCL on CUDA, gloo elsewhere), or alone."""
    device = pick_device(device_name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model itself, or DistributedDataParallel around it."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


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


def broadcast(values: torch.Tensor, world: World) -> None:
    """Overwrites `values` by those of rank 0."""
    if world.size > 1:
        dist.broadcast(values.detach(), 0)


def from_main(value: Value, world: World) -> Value:
    """The `value` of rank 0 (anything that can be pickled) in every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, device=world.device)
    return box[0]


def unwrap(model: Module) -> Module:
    """The module inside DistributedDataParallel, or the module itself."""
    # The cast: what is wrapped is declared as what is inside.
    return cast(Module, model.module) if isinstance(model, DistributedDataParallel) else model


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def exchange_of_gradients(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Around both passes of a micro-batch (the forward decides); gradients are `wanted` in the last one of a step."""
    return nullcontext() if wanted or not isinstance(model, DistributedDataParallel) else model.no_sync()
