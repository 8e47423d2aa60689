"""A CUDA device that is not there: tensors that hold CPU data and claim to lie on cuda:0.

They raise where a CUDA run would: tensors of two devices in one operation, a random generator of the other device,
`numpy()` of a tensor on the device, products of integers. Waits for the device and copies to it are counted by the line
of this library that asked for them, and so are launches. Kernels, memory, several processes and compiled graphs are not
pretended; CUDA graphs are (`device.graphs`).

PyTorch itself takes these tensors for CPU tensors whose device has an index: what autograd makes for itself on "the
same device" is asked for on cpu:0, which nobody else asks for, and becomes a pretended tensor too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import graphs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from consonar.distributed import side_stream

CUDA = torch.device("cuda", 0)
STAND_IN = torch.device("cpu", 0)
MAY_MIX = {"copy_", "_to_copy", "index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that take tensors of both devices; the last four only indices (and each of those is a copy)."""
WAITS = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero"}
"""Operations whose result has a shape, or is a number, that the CPU has to know."""
INTEGER_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot"}


class Log:
    """`waits` and `copies`: how often the CPU waited for the device or copied to it, by (kind, file:function).

    `launches`: what it asked the device to do, by the name of the operation; a graph is one.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()

    def clear(self) -> None:
        self.waits.clear()
        self.copies.clear()
        self.launches.clear()

    def wait(self, kind: str) -> None:
        if graphs.STATE.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}, at {where()}")
        self.waits[kind, where()] += 1


LOG = Log()
DEVICE_SEEDS: set[int] = set()
"""Seeds of the generators that claim to be on the device: PyTorch hands operations a new object for the same one."""
DEVICE_SEED_BIT = 1 << 62


def where() -> str:
    """file:function of the innermost frame of this library, else of the test."""
    frame, test = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/src/consonar/" in name:
            return f"{name.split('/src/consonar/')[1]}:{frame.f_code.co_name}"
        if test == "?" and "/tests/" in name and name != __file__:
            test = f"{name.split('/tests/')[1]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return test


def is_pretended(value: object) -> bool:
    return isinstance(value, PretendedTensor)


def plain(value: Any) -> Any:
    """The CPU tensor inside a pretended one, on the same storage; in lists too, and the CPU for the device."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, torch.device) and on_device(value):
        return torch.device("cpu")
    if not is_pretended(value):
        return value
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        inside = torch.empty(0, dtype=value.dtype)
        return inside.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())


class PretendedTensor(torch.Tensor):
    """CPU data under the claim that it lies on cuda:0."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> PretendedTensor:
        with torch.inference_mode(False):
            return torch.Tensor._make_subclass(cls, inside.detach(), False, dispatch_device=True)

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **settings: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **settings: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        LOG.wait("tolist")
        return plain(self.detach()).tolist()

    def data_ptr(self) -> int:
        return plain(self).data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Any = PretendedTensor(plain(self).clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Pretence(TorchDispatchMode):
    """Under it, what is made on "cuda" is pretended."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: checked as CUDA would check it, run on the CPU, its result claimed where CUDA would have it."""
    if func is torch.ops.prim.device.default:
        return STAND_IN
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    leaves = flat([*args, *kwargs.values()])
    inside = [leaf for leaf in leaves if is_pretended(leaf)]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    claimed = on_device(wanted[0]) if wanted else bool(inside)
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator):
            check_generator(func, leaf, claimed)
    if not inside and not claimed:
        return func(*args, **kwargs)
    if torch.is_inference_mode_enabled() and in_parts(func) and func._opname != "scaled_dot_product_attention":
        with Pretence():  # outside of inference mode, operations arrive here in parts anyway
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    name = func._opname
    check_devices(name, func, [leaf for leaf in leaves if isinstance(leaf, Tensor)], args)
    count(name, func, args, kwargs, claimed)
    with torch.inference_mode(False), torch.no_grad():
        result = compute(func, tuple(map(plain, args)), {key: plain(value) for key, value in kwargs.items()})
    return claim(func, args, kwargs, result) if claimed else result


@cache
def in_parts(func: Any) -> bool:
    """Whether PyTorch writes an operation as others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the CPU; counted, or in a capture noted."""
    if (tape := graphs.STATE.tape) is not None:
        tape.prepare(func, args, kwargs)
    result = func(*args, **kwargs)
    if tape is not None:
        tape.note(func, args, kwargs, result)
    elif graphs.is_launch(func, args, kwargs, result):
        LOG.launches[func._opname] += 1
    return result


def flat(values: list[Any]) -> list[Any]:
    """The values, and those in lists among them."""
    return [leaf for value in values for leaf in (flat([*value]) if isinstance(value, list | tuple) else [value])]


def on_device(device: torch.device) -> bool:
    return device.type == "cuda" or device == STAND_IN


def claim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The results as pretended tensors; of an operation in place the tensor that it was given."""
    if isinstance(result, Tensor):
        for given in graphs.written(func, args, kwargs):
            return given
    return pretended(result)


def pretended(value: Any) -> Any:
    """CPU tensors under the claim, in lists too; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(pretended, value))
    return PretendedTensor(value) if type(value) is Tensor and value.device.type == "cpu" else value


def check_devices(name: str, func: Any, tensors: list[Tensor], args: tuple[Any, ...]) -> None:
    """Raises RuntimeError where CUDA would: for tensors on two devices. A single number may come from the CPU."""
    inside = [tensor for tensor in tensors if is_pretended(tensor)]
    outside = [tensor for tensor in tensors if not is_pretended(tensor)]
    if name in INTEGER_PRODUCTS and inside and not inside[0].dtype.is_floating_point:
        raise NotImplementedError(f'"{name}_cuda" not implemented for {inside[0].dtype} at {where()}')
    if not inside or not outside:
        return
    shapes = [tuple(tensor.shape) for tensor in outside]
    if name in MAY_MIX:
        if name not in ("copy_", "_to_copy"):
            values = [args[0], *args[2:3]]  # of index and index_put: the tensor, and what is put
            if len({is_pretended(value) for value in values if isinstance(value, Tensor) and value.ndim}) > 1 or (
                not is_pretended(args[0])
            ):
                raise RuntimeError(f"indices and values on other devices than the indexed tensor in {name}, {where()}")
        return
    lookups = ("embedding", "searchsorted", "gather", "index_select", "scatter", "native_layer_norm", "cat", "stack")
    if any(tensor.ndim for tensor in outside) or name in (*lookups, *INTEGER_PRODUCTS):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu, in {func}: "
            f"{shapes} on the CPU, at {where()}"
        )


def check_generator(func: Any, rng: torch.Generator, claimed: bool) -> None:
    if (rng.initial_seed() in DEVICE_SEEDS) != claimed:
        expected, found = ("cuda", "cpu") if claimed else ("cpu", "cuda")
        raise RuntimeError(
            f"Expected a '{expected}' device type for generator but found '{found}' in {func} at {where()}"
        )


def count(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], claimed: bool) -> None:
    """Adds this operation to `LOG`, if it waits or copies."""
    first = is_pretended(args[0]) if args else False
    if name == "_to_copy" and first != claimed:
        if first and not kwargs.get("non_blocking"):
            LOG.wait("to the CPU")
        elif first:
            LOG.copies["to the CPU", where()] += 1
        else:
            LOG.copies["to the device", where()] += 1
            if not kwargs.get("non_blocking"):
                LOG.wait("copy to the device")
    elif name == "copy_" and first != is_pretended(args[1]):
        LOG.wait("copy to the device" if first else "to the CPU")
    elif name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_") and first:
        for index in args[1]:
            if index is not None and not is_pretended(index):
                LOG.wait("index from the CPU")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                LOG.wait("mask as index")
    elif first and (name in WAITS or name == "_local_scalar_dense"):
        LOG.wait("number" if name == "_local_scalar_dense" else name)
    elif first and name == "repeat_interleave" and func._overloadname == "Tensor" and not kwargs.get("output_size"):
        LOG.wait(name)


class PretendedGenerator(torch.Generator):
    """A random generator that claims to be on the device. Its numbers are others than those of a CPU generator."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]

    def manual_seed(self, seed: int) -> PretendedGenerator:
        super().manual_seed(seed ^ DEVICE_SEED_BIT)
        DEVICE_SEEDS.add(self.initial_seed())
        return self


class PretendedStream:
    """One in which everything is done at once, as in all of them here. `clock`: how much of each stream would be done
    before what is asked of this one next; `ask` is to be called where that matters."""

    def __init__(self, device: Any = None) -> None:
        self.clock: Counter[PretendedStream] = Counter()

    def wait_stream(self, other: PretendedStream) -> None:
        self.clock |= other.clock

    def ask(self) -> Counter[PretendedStream]:
        self.clock[self] += 1
        return self.clock.copy()


STREAMS = [PretendedStream()]
"""The last one is the current."""


@contextmanager
def in_stream(stream: PretendedStream) -> Iterator[None]:
    STREAMS.append(stream)
    yield
    STREAMS.pop()


PROPERTIES = SimpleNamespace(name="a pretended device", total_memory=2**31, major=9, minor=0)


class PretendedEvent:
    """What was asked for before it is here once it was waited for."""

    def record(self, stream: PretendedStream) -> None: ...

    def synchronize(self) -> None:
        LOG.waits["event", where()] += 1


class GeneratorClass(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch._C.Generator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type == "cuda":
            return PretendedGenerator().manual_seed(0)
        return torch._C.Generator(device)


class AnyGenerator(metaclass=GeneratorClass):
    """What `torch.Generator` is under the pretence."""


@contextmanager
def pretended_cuda() -> Iterator[Log]:
    """PyTorch as on a machine with one CUDA device, for this thread; what was waited for and copied, from zero."""
    with pytest.MonkeyPatch.context() as patch:
        to, mm, autocast = torch.Tensor.to, torch.mm, torch.autocast.__init__

        def indexed(device: Any) -> Any:
            """With an index: without one, PyTorch asks the driver for it."""
            is_name = isinstance(device, str | torch.device) and torch.device(device).type == "cuda"
            return CUDA if is_name else device

        def move(tensor: Tensor, *args: Any, **settings: Any) -> Tensor:
            args, settings = tuple(map(indexed, args)), {key: indexed(value) for key, value in settings.items()}
            if is_pretended(tensor) and CUDA in (*args, *settings.values()) and not settings.get("copy"):
                dtypes = {value for value in (*args, *settings.values()) if isinstance(value, torch.dtype)}
                if dtypes <= {tensor.dtype}:
                    return tensor  # PyTorch takes cpu:0 for another device and would copy
            return to(tensor, *args, **settings)

        def multiply(one: Tensor, two: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            """A CPU does not have products of bf16 that are float32."""
            return mm(one, two) if out_dtype is None else mm(one.to(out_dtype), two.to(out_dtype))

        def cast(context: torch.autocast, device_type: str, *args: Any, **settings: Any) -> None:
            autocast(context, "cpu" if device_type == "cuda" else device_type, *args, **settings)

        def made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            """Of Python's numbers, PyTorch makes a tensor on the CPU and copies it where nothing can step in."""
            return lambda data, *, device=None, **settings: move(make(data, **settings), *([device] if device else []))

        answers: dict[str, Any] = {
            "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1,
            "current_device": 0, "_is_in_bad_fork": False, "get_device_name": "a pretended device", "_lazy_init": None,
            "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "synchronize": None,
            "set_device": None, "reset_peak_memory_stats": None, "max_memory_allocated": 0,
            "memory_allocated": 2**30, "memory_reserved": 2**30,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8), "is_tf32_supported": True,
            "mem_get_info": (2**30, 2**31),
            "graph_pool_handle": (0, 1), "is_current_stream_capturing": False, "get_device_properties": PROPERTIES,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *args, answer=answer, **settings: answer)
        patch.setattr(torch.cuda, "Stream", PretendedStream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: STREAMS[-1])
        patch.setattr(torch.cuda, "stream", in_stream)
        patch.setattr(torch.cuda, "Event", PretendedEvent)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        ours = {"CUDAGraph": graphs.Graph, "graph": graphs.capture, "empty_cache": graphs.empty_cache}
        for name, pretended_one in ours.items():
            patch.setattr(torch.cuda, name, pretended_one)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", graphs.end_allocate)
        patch.setattr(torch._C, "_cuda_releasePool", graphs.release)
        patch.setattr(graphs.STATE, "made", [])
        patch.setattr(graphs.STATE, "underway", [])
        patch.setattr(graphs.STATE, "uses", Counter())
        patch.setattr(graphs.STATE, "replayed", lambda: LOG.launches.update(["graph"]))
        patch.setattr(torch, "mm", multiply)
        patch.setattr(torch.Tensor, "to", move)
        patch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **settings: move(tensor, CUDA))
        patch.setattr(torch.autocast, "__init__", cast)
        patch.setattr(torch, "Generator", AnyGenerator)
        patch.setattr(torch, "tensor", made_here(torch.tensor))
        patch.setattr(torch, "as_tensor", made_here(torch.as_tensor))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        LOG.clear()
        try:
            with Pretence():
                yield LOG
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            side_stream.cache_clear()  # a device that is there has others
