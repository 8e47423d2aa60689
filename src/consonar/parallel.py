"""How the processes of a run hold what is trained: each the whole of it (DistributedDataParallel), or a shard (FSDP2).

A sharded model trains as any other does, by calling it. What samples from it, measures or writes it does so inside of
`whole`, with a module that has all weights and nothing of FSDP's.
"""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from consonar.distributed import World
from consonar.errors import UserError
from consonar.options import CountOrZero, Options, ReadOnlyWith
from consonar.precision import autocast_type

Module = TypeVar("Module", bound=nn.Module)
SKELETON = "whole_without_weights"
HYBRID = ReadOnlyWith(lambda given: given.strategy == "hybrid", "{}strategy 'hybrid'")
SHARDED = ReadOnlyWith(lambda given: given.shards, "{}strategy 'fsdp' or 'hybrid'")
MULTIPLIED = nn.Linear, nn.Conv2d
"""What autocast multiplies in bf16, and would cast its weights to that."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Options):
    """How the processes of a run share weights, gradients and optimizer."""

    section = "parallel"

    strategy: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    """ddp: each process holds all of it; fsdp: a shard; hybrid: a shard of the copy of its group; auto: ddp."""
    shard_size: Annotated[CountOrZero, HYBRID] = 0
    """Processes in a group, which hold one copy together; 0: those of a machine."""
    reshard_after_forward: Annotated[bool, SHARDED] = True
    """Let go of a block's weights between forward and backward; without, less is exchanged and more kept."""
    param_dtype: Annotated[Literal["fp32", "bf16"], SHARDED] = "fp32"
    """What blocks gather the weights of their products in; bf16 changes nothing in a run of bf16 but what it takes."""
    reduce_dtype: Annotated[Literal["fp32", "bf16"], SHARDED] = "fp32"
    """What gradients are summed in, over processes and micro-batches."""
    prefetch_forward: Annotated[CountOrZero, SHARDED] = 0
    """Blocks that are gathered ahead in a forward pass; 0: PyTorch's own way, the next one when its turn comes."""
    prefetch_backward: Annotated[CountOrZero, SHARDED] = 0
    """Blocks that are gathered ahead in a backward pass; 0: PyTorch's own way, the next one."""

    @property
    def shards(self) -> bool:
        return self.strategy in ("fsdp", "hybrid")

    def used(self, world: World) -> str:
        """The strategy with so many processes; `single` where one holds everything and exchanges nothing."""
        if self.shards and dist.is_initialized():
            return self.strategy
        return "ddp" if world.size > 1 else "single"

    def group(self, processes: int, of_machine: int | None = None) -> int:
        """How many of so many processes hold a copy together; `of_machine`: those of one machine, None: as torchrun
        says. Raises `UserError` for a group that does not divide them."""
        if processes == 1 or not self.shards:
            return 1
        here = of_machine or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        size = processes if self.strategy == "fsdp" else self.shard_size or here
        if processes % size:
            said = f"{size}" if self.shard_size else f"0 (the {size} of a machine)"
            choices = ", ".join(str(count) for count in range(1, processes + 1) if processes % count == 0)
            raise UserError(
                f"parallel.shard_size: {said} does not divide the {processes} processes; choices: {choices}"
            )
        return size

    def check(self, precision: str, processes: int, of_machine: int | None = None) -> None:
        """Raises `UserError` for what does not go with so many processes (`group`), and for weights that are gathered
        in fewer bits than a run of this precision multiplies."""
        self.group(processes, of_machine)
        if self.param_dtype == "bf16" != precision:
            raise UserError(
                f"parallel.param_dtype: 'bf16' is read only with loop.precision bf16, and this run is in {precision}; "
                "remove it, or set it to its default 'fp32'"
            )

    def mesh(self, world: World) -> DeviceMesh:
        """The processes in one row of shards, or in several rows that hold a copy each."""
        if self.strategy == "fsdp":
            return init_device_mesh(world.device.type, (world.size,))
        size = self.group(world.size)
        return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, parts: Iterable[nn.Module], config: ParallelConfig, world: World) -> None:
    """Leaves this process its shard of every weight, on its device, where `config` says so; all processes at once.

    Each of the `parts` is gathered for its own pass alone, the rest for that of the model; in float32, or of the parts
    the layers whose weights autocast would cast, in bf16, to the same numbers. What it leaves in float32 (norms) has
    then gathers of its own.
    """
    if config.used(world) not in ("fsdp", "hybrid"):
        return
    empty = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), w.requires_grad) for w in model.parameters()}
    vars(model)[SKELETON] = copy.deepcopy(model, empty)  # not set as an attribute: it would be a part of the model
    mesh = config.mesh(world)
    # Of a view that a module returns: nothing here changes one in its place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    summed = autocast_type(config.reduce_dtype) or torch.float32
    kept = MixedPrecisionPolicy(reduce_dtype=summed, cast_forward_inputs=False)
    low = autocast_type(config.param_dtype)
    sharded = list[FSDPModule]()
    for part in parts:
        for module in part.modules() if low else ():
            if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, MULTIPLIED):
                fully_shard(module, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=kept)
        gathered = replace(kept, param_dtype=low)
        sharded.append(
            fully_shard(part, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=gathered)
        )
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=kept)
    # Norms with gathers of their own would be what PyTorch takes for the next one of a backward pass.
    backward = config.prefetch_backward or (1 if low else 0)
    for index, one in enumerate(sharded):
        if config.prefetch_forward:
            one.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + config.prefetch_forward])
        if backward:
            one.set_modules_to_backward_prefetch(sharded[max(0, index - backward) : index][::-1])


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: Module, weights: Mapping[str, Tensor] | None = None) -> Iterator[Module]:
    """A module with all weights in this process: the model itself, or for a sharded one another, for as long as this
    lasts, gathered once. All processes enter at once. For a sharded one `weights` may stand in for some of its own."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    copied = copy.deepcopy(vars(model)[SKELETON])
    with torch.inference_mode(False), torch.no_grad():
        state = {**model.state_dict(), **(weights or {})}
        copied.load_state_dict({key: full(value) for key, value in state.items()}, assign=True)
    yield copied
    model.reshard()  # a pass of the model itself in the meantime, without gradient, has left what is in no block whole


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor in shards, gathered by all processes at once; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in shards, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(other: object, tensor: Tensor) -> Tensor:
    """The whole `tensor`, which every process has, in shards as a weight `other` of its shape; else as it is."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or other.shape != tensor.shape:
        return tensor
    moved = tensor.to(other.device_mesh.device_type)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model itself, or DistributedDataParallel around it."""
    if world.size == 1 or is_sharded(model):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def unwrap(model: Module) -> Module:
    """The module inside DistributedDataParallel, or the module itself."""
    # The cast: what is wrapped is declared as what is inside.
    return cast(Module, model.module) if isinstance(model, DistributedDataParallel) else model


def exchange_of_gradients(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Around both passes of a micro-batch (the forward decides); gradients are `wanted` in the last one of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
        # A cast that autocast keeps from the micro-batch before gets its gradient after those of its block are
        # exchanged, so that it would be one of the next step.
        torch.clear_autocast_cache()
        return nullcontext()
    return nullcontext() if wanted or not isinstance(model, DistributedDataParallel) else model.no_sync()
