"""Products, causal attention, dropout and convolutions on a CPU, each in PyTorch's way or in ours, as
`consonar.cpu.timing` finds faster here. `tune` applies them to a finished generator.

Letters: `B` batch, `L` positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import CausalAttention
from consonar.cpu import kernels_mode, timing
from consonar.cpu.timing import Way
from consonar.memory import bytes_of_machine
from consonar.seeding import generator_of
from consonar.types import Weights

HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
# Weights below which calling oneDNN costs more than it saves; rows above which timings stay as they are.
SMALLEST_WEIGHT, MOST_ROWS = 2**16, 128
# Numbers of a tensor from which on our dropout is worth it.
SMALLEST_DROPOUT = 2**15
# Bytes of weights that are timed in turn, as the layers of a model are: one alone would stay in the processor's cache.
TIMED_BYTES = 2**25
# Tokens of a batch from which on copies of the weights are worth making: a copy takes the time of some four products,
# and with it a product three quarters of what it takes without.
FEWEST_TOKENS = 64
# Share of the machine's memory that they may take: of all, not of what is free, for another choice rounds otherwise.
MOST_MEMORY = 1 / 8
Model = TypeVar("Model", bound=Weights)


def tune(generator: Model) -> Model:
    """The generator itself, whose layers of the types in `TUNED` become ours, which choose; weights and keys stay."""
    for layer in generator.children():
        if type(layer) in TUNED:
            layer.__class__ = TUNED[type(layer)]
        else:
            tune(layer)
    return generator


class Linear(nn.Linear):
    """x A^T + b.

    While sampling on a CPU in float32, oneDNN multiplies instead of PyTorch's default there, MKL, where that was
    measured to be faster for as many rows (benchmarks/llamagen_sampling.py). Results differ by rounding.
    """

    ordered: Tensor | None = None
    """The weight in oneDNN's own order, as long as `ordered_weights` lasts."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            not torch.compiler.is_compiling()  # first: a compiled graph asks nothing else, about modes least of all
            and HAS_ONEDNN
            and torch.is_inference_mode_enabled()
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and weight.numel() >= SMALLEST_WEIGHT
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and (self.ordered is not None or prefers_onednn(x.numel() // x.shape[-1], *weight.shape))
        ):
            return onednn_linear(x, weight if self.ordered is None else self.ordered, self.bias)
        return super().forward(x)


@contextmanager
def ordered_weights(generator: object, num_rows: int, num_tokens: int) -> Iterator[None]:
    """Around the drawing of a batch, in inference mode: products of so many rows find weights in oneDNN's own order,
    which it else makes anew in every product, where that was measured to be faster. Weights are as they were after it.
    """
    layers = [one for one in generator.modules() if isinstance(one, Linear)] if isinstance(generator, nn.Module) else []
    layers = [one for one in layers if can_be_ordered(one.weight) and prefers_order(num_rows, *one.weight.shape)]
    enough = sum(one.weight.nbytes for one in layers) <= MOST_MEMORY * bytes_of_machine()
    layers = layers if enough and num_tokens >= FEWEST_TOKENS else []
    try:
        for layer in layers:
            layer.ordered = onednn_order(layer.weight, num_rows)
        yield
    finally:
        for layer in layers:
            layer.ordered = None


def can_be_ordered(weight: Tensor) -> bool:
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST_WEIGHT
    return HAS_ONEDNN and fits and not torch.is_autocast_enabled("cpu")


def prefers_onednn(num_rows: int, width_out: int, width_in: int) -> bool:
    """Whether oneDNN is faster here for so many rows and weights of this shape; weights of 2^k to 2^(k+1) are one."""
    rows = min(MOST_ROWS, nearest_power_of_two(num_rows))
    choice = f"linear, {rows} rows, weights of 2^{(width_out * width_in).bit_length() - 1}"
    return timing.ours(choice, lambda: linear_ways(rows, width_out, width_in))


def prefers_order(num_rows: int, width_out: int, width_in: int) -> bool:
    """Whether products are faster here with weights in oneDNN's order than as `Linear` multiplies without."""
    rows = min(MOST_ROWS, nearest_power_of_two(num_rows))
    choice = f"linear, ordered, {rows} rows, weights of 2^{(width_out * width_in).bit_length() - 1}"
    without = prefers_onednn(num_rows, width_out, width_in)  # now: what is timed must not ask for another timing

    def ways() -> tuple[Way, Way]:
        return linear_ways(rows, width_out, width_in)[without], linear_ways(rows, width_out, width_in, ordered=True)[1]

    return timing.ours(choice, ways)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_order(weight: Tensor, num_rows: int) -> Tensor:
    """The weight as oneDNN reads it for so many rows: what only `onednn_linear` takes."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)


def nearest_power_of_two(count: int) -> int:
    """Of 1, 2, 4, ...: sizes that are timed as one. 3 counts as 4, 66 as 64."""
    return 1 << (4 * count // 3).bit_length() - 1


def linear_ways(rows: int, width_out: int, width_in: int, *, ordered: bool = False) -> tuple[Way, Way]:
    """Products of `rows` rows with weights of this shape, for `timing.ours`; oneDNN's in its order, or as they are."""
    copies = max(1, min(16, TIMED_BYTES // (4 * width_out * width_in)))
    weights = [torch.full((width_out, width_in), 0.01) for _ in range(copies)]
    given = [onednn_order(weight, rows) for weight in weights] if ordered else weights
    x = torch.full((rows, width_in), 0.1)

    def pytorch() -> None:
        for weight in weights:
            F.linear(x, weight)

    def onednn() -> None:
        for weight in given:
            onednn_linear(x, weight, None)

    return pytorch, onednn


class Attention(CausalAttention):
    """PyTorch's fused kernel, but for training on a CPU where plain products were measured to be faster.

    On some processors they take a third of its time at short lengths, on others three times it
    (benchmarks/training.py). With dropout PyTorch has no fused kernel for a CPU, and the two ways draw other numbers.
    """

    def unmasked(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        if (
            not torch.compiler.is_compiling()
            and q.device.type == "cpu"
            and torch.is_grad_enabled()
            and prefers_plain_attention(q.shape[2], q.shape[3], q.dtype, dropout)
        ):
            return plain_attention(q, k, v, dropout)
        return super().unmasked(q, k, v, dropout)


def prefers_plain_attention(num_positions: int, head_dim: int, dtype: torch.dtype, dropout: float = 0.0) -> bool:
    """Whether plain products are faster here in training; lengths count as the nearest power of two."""
    length = nearest_power_of_two(num_positions)
    choice = f"attention, {length} positions of {head_dim} in {str(dtype).removeprefix('torch.')}"
    choice += ", with dropout" if dropout else ""
    return timing.ours(choice, lambda: attention_ways(length, head_dim, dtype, dropout))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal softmax(q k^T / sqrt(dim)) v in plain products, all (B, heads, L, dim)."""
    length = q.shape[2]
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    weights = drop(scores.softmax(-1, dtype=q.dtype), dropout)
    return (weights @ v.flatten(0, 1)).view_as(q)


class Dropout(nn.Dropout):
    """nn.Dropout, but for training on a CPU: see `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


def drop(x: Tensor, p: float) -> Tensor:
    """x with each number zeroed with probability `p`, the others divided by 1 - p.

    On a CPU by 16 random bits a number, so that p is a multiple of 2^-16: on every processor tried that is faster than
    PyTorch's dropout from `SMALLEST_DROPOUT` numbers on.
    """
    if p == 0:
        return x
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < SMALLEST_DROPOUT:
        return F.dropout(x, p)
    threshold = round(p * 2**16)
    if not 0 < threshold < 2**16 or not timing.ours("dropout", None):
        return F.dropout(x, p)
    bits = torch.empty(-(x.numel() // -4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= threshold - 2**15
    return x * (kept.to(x.dtype) * (2**16 / (2**16 - threshold)))


def attention_ways(length: int, head_dim: int, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Way, Way]:
    """Attention forward and backward over `length` positions, for `timing.ours`; heads for some milliseconds."""
    heads = max(1, min(64, 2**19 // length**2))
    with torch.inference_mode(False), torch.enable_grad():
        rng = generator_of(0)
        q, k, v = (torch.randn(1, heads, length, head_dim, generator=rng).to(dtype).requires_grad_() for _ in "qkv")

    def timed(attention: Way) -> Way:
        def run() -> None:
            with (
                torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
            ):  # fmt: skip
                torch.autograd.grad(attention().sum(), (q, k, v))  # type: ignore[attr-defined]

        return run

    return (
        timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)),
        timed(lambda: plain_attention(q, k, v, dropout)),
    )


TUNED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear, nn.Dropout: Dropout, CausalAttention: Attention,
}  # fmt: skip
"""PyTorch's layer to ours of the same weights."""


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with the channels innermost in memory, which convolutions are faster on; rounds otherwise."""
    plain = kernels_mode() == "pytorch"
    return images.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)


def spare_copies(network: nn.Module) -> None:
    """Even padding inside the convolutions of EfficientNet, activations in place: the same bits in half the time."""
    if kernels_mode() == "pytorch":
        return
    layer: Any  # the package is untyped
    for layer in network.modules():
        if isinstance(layer, nn.ReLU6):
            layer.inplace = True
        padding = getattr(layer, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if left == right and top == bottom:  # not so where the stride is 2
                layer.padding, layer.static_padding = (top, left), nn.Identity()
