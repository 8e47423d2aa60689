"""What an update calculates and keeps in memory, counted operation by operation on tensors without memory.

PyTorch's fake tensors have shapes, types and a device but no numbers, so that the code of the run itself is what is
counted, at any size, on any machine.
"""

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ATEN = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val=None, **__: (
        flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, out_val=None, **__: (
        flop_counter.sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}
"""Of products, 2 for each multiplication with its addition; attention is counted whole, causal or not."""
LOSSES, FORWARD, BACKWARD, AGAIN, UNTRAINED = "losses", "forward", "backward", "recomputed", "without gradient"
CASTS, GRADIENTS = "bf16 copies of weights", "gradients"


class Ledger(TorchDispatchMode):
    """Inside, what runs is booked on a label: the `flops` by (label, type), and the bytes that are `alive` by label.

    `peak` are those at the moment when they were most, `most` is the most of each label. Memory of the `weights` is not
    counted.
    """

    def __init__(self, weights: Sequence[Tensor], *, cuda: bool = False):
        super().__init__()
        self.cuda = cuda
        self.label = LOSSES
        self.flops: Counter[tuple[str, torch.dtype]] = Counter()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.owners: dict[int, str] = {}
        self.weights = {id(weight.untyped_storage()) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATEN._local_scalar_dense.default:  # what is asked of numbers is whether all is well
            return args[0].dtype == torch.bool or 0
        named = {
            key: None if key == "generator" else value for key, value in (kwargs or {}).items()
        }  # nothing is drawn
        count = FLOPS.get(func._overloadpacket)
        if count is None and torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default:
            with self:  # PyTorch has not taken it apart yet
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **named)
        if count is not None:
            kind = next(arg.dtype for arg in args if isinstance(arg, Tensor))
            self.flops[self.label, kind] += count(*args, **named, out_val=out)
        casts = func is ATEN._to_copy.default and id(args[0].untyped_storage()) in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, CASTS if casts else self.label)
        return out

    def see(self, tensor: Tensor, label: str) -> None:
        """Books the memory behind a tensor on a label, if it is on none."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.owners or key in self.weights:
            return
        self.owners[key] = label
        self.alive[label] += storage.nbytes()
        self.most[label] = max(self.most[label], self.alive[label])
        weakref.finalize(storage, self.forget, key, storage.nbytes())
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def forget(self, key: int, size: int) -> None:
        self.alive[self.owners.pop(key)] -= size

    def is_gradient(self, gradient: Tensor) -> None:
        """Moves a gradient of weights to the label of such."""
        key, size = id(gradient.untyped_storage()), gradient.untyped_storage().nbytes()
        if self.owners.get(key, GRADIENTS) != GRADIENTS:
            self.alive[self.owners[key]] -= size
            self.alive[GRADIENTS] += size
            self.owners[key] = GRADIENTS

    @contextmanager
    def labelled(self, name: str) -> Iterator[None]:
        before, self.label = self.label, name
        try:
            yield
        finally:
            self.label = before

    def once(self, owner: object, method: str, name: str) -> None:
        """From now on this method of an object is made once for tensors of the same shapes, as long as it makes no
        gradient; what it took is booked again for those after it, and what they return on `name`."""
        called = getattr(owner, method)
        known: dict[object, tuple[Counter[tuple[str, torch.dtype]], dict[str, int], object]] = {}

        @functools.wraps(called)
        def booked(*args: Any, **kwargs: Any) -> Any:
            key = tuple((t.shape, t.dtype) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if torch.is_grad_enabled():
                return called(*args, **kwargs)
            if key not in known:
                flops, alive, peak = self.flops.copy(), self.alive.copy(), self.peak
                self.peak = alive.copy()
                out = called(*args, **kwargs)
                inside = {label: count - alive[label] for label, count in self.peak.items()}
                known[key] = self.flops - flops, inside, tree_map_only(Tensor, shaped_like, out)
                self.peak = max(self.peak, peak, key=Counter.total)
                return out
            flops, inside, out = known[key]
            self.flops.update(flops)
            now = Counter({label: self.alive[label] + inside.get(label, 0) for label in {*self.alive, *inside}})
            self.peak, self.most = max(self.peak, now, key=Counter.total), self.most | now
            with self.labelled(name):
                return tree_map_only(functools.partial, lambda make: make(), out)

        object.__setattr__(owner, method, booked)

    def beside(self, owner: object, method: str, label: str) -> None:
        """From now on, while this method of an object runs again, what a label had at most is in memory: work in
        another stream."""
        called, calls = getattr(owner, method), itertools.count()

        @functools.wraps(called)
        def inside(*args: Any, **kwargs: Any) -> Any:
            more = self.most[label] - self.alive[label] if next(calls) else 0
            self.alive[label] += more
            out = called(*args, **kwargs)
            self.alive[label] -= more
            return out

        object.__setattr__(owner, method, inside)

    def follow(self, owner: object, method: str, name: str, *, of_trainee: bool = False) -> None:
        """From now on what this method of an object makes is booked on `name`; what is `of_trainee`, in the backward
        pass on `AGAIN`, and without a gradient on `UNTRAINED`."""
        called = getattr(owner, method)

        @functools.wraps(called)
        def inside(*args: Any, **kwargs: Any) -> Any:
            label, again = name, of_trainee and self.label in (BACKWARD, AGAIN)
            if of_trainee:
                label = AGAIN if again else name if torch.is_grad_enabled() else UNTRAINED
            # The backward pass has left the mode: PyTorch takes it for a function of its own.
            with self.labelled(label), AsOnCuda() if again and self.cuda else nullcontext():
                return called(*args, **kwargs)

        # Past `nn.Module`'s own way, which would take a network that is followed for a part.
        object.__setattr__(owner, method, inside)


class AsOnCuda(TorchFunctionMode):
    """On fake tensors of a CPU, what CUDA does otherwise and memory shows: attention that keeps no scores with dropout
    either, dropout that keeps a byte a number, RMSNorm in one kernel, and norms that autocast calculates in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named["dropout_p"] = 0.0
        elif func is F.dropout and named.get("training", True):
            return torch.native_dropout(args[0], named.get("p", args[1] if len(args) > 1 else 0.5), True)[0]
        elif func is F.rms_norm:
            return F.layer_norm(args[0], args[1])
        elif func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **named)


def shaped_like(tensor: Tensor) -> functools.partial[Tensor]:
    """What makes another of its shape."""
    return functools.partial(torch.empty, tensor.shape, dtype=tensor.dtype)


def fake(module: nn.Module) -> None:
    """Puts fake tensors on the CPU in the place of a module's own; inside of a `FakeTensorMode`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(empty(weight), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer)


def empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """All weights and buffers, each once."""
    kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in kept}.values())


def size_of(*modules: nn.Module) -> int:
    """Bytes of them."""
    return sum(tensor.nbytes for tensor in tensors_of(*modules))
