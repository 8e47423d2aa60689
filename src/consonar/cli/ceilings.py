"""`doctor --benchmark`: what this device can do at most, measured, and which share of it the library's work reaches.

The ceiling of a work is the roofline's (Williams et al., CACM 2009): the longer of the time that its products take at
the rate of one large product, and of the time that its memory takes to be read once at the rate of a large copy.
Models have random weights: time does not depend on them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from consonar.cpu.kernels import tune
from consonar.distributed import World
from consonar.generators import build_generator
from consonar.generators.rear import REAR_PRESETS, ReARConfig, positions_ahead
from consonar.precision import autocast_type, pick_precision, with_weights
from consonar.sampling.sample import SamplerConfig, decoder_of, draw_batch
from consonar.seeding import generator as seeded
from consonar.seeding import integers, uniform
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer
from consonar.training.checkpoints import State
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.loop import Built, Running, update
from consonar.training.objectives import method_of_config
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.training.tracking import Tracker
from consonar.training.trainee import Trainee
from consonar.types import Generator, TokenBatch

Call = Callable[[], object]
SECONDS = 4.0
"""Of each timing, less where `MOST_CALLS` are faster, more where a call takes longer."""
MOST_CALLS = 9


@dataclass(frozen=True)
class Size:
    """How much is timed, so that all of it takes about a minute."""

    generator: ReARConfig
    tokenizer: MaskGITConfig
    rows: int
    """Sampled at once."""
    tokens: int
    """Drawn of each."""
    pictures: int
    """Coded at once."""
    step_rows: int
    """Of a training step."""
    copied: int
    """Bytes of the copy."""
    product: int
    """Rows and columns of the matrices."""


IMAGENET = REAR_PRESETS["S"].sized(1024, 256, 1000)
SIZES = {
    "cuda": Size(
        IMAGENET, MaskGITConfig(), rows=128, tokens=256, pictures=64, step_rows=32, copied=2**30, product=8192
    ),
    "cpu": Size(
        replace(IMAGENET, num_layers=2), MaskGITConfig(), rows=4, tokens=32, pictures=1, step_rows=4, copied=2**27,
        product=1536,
    ),
}  # fmt: skip


def seconds(run: Call, device: torch.device) -> float:
    """Of one call, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Call, device: torch.device) -> float:
    """The median of some calls, after one that makes plans and handles."""
    spent = seconds(run, device)
    times: list[float] = []
    while not times or (spent < SECONDS and len(times) < MOST_CALLS):
        times.append(seconds(run, device))
        spent += times[-1]
    return statistics.median(times)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes that a copy of `size` bytes reads and writes in a second."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, width: int, dtype: torch.dtype) -> float:
    """Additions and multiplications that the product of two matrices (width, width) makes in a second."""
    one, two = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / median_seconds(lambda: one @ two, device)


def operations_of(run: Call) -> int:
    """Additions and multiplications of all products and convolutions in a call, which is made."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def weights_read(generator: Generator, rows: int) -> float:
    """How many numbers of its blocks' weights a token of so many rows reads; AdaLN's are read once for some tokens."""
    named = generator.blocks.named_parameters()
    return sum(one.numel() / (positions_ahead(rows) if "adaLN" in name else 1) for name, one in named)


def drawn_on(device: torch.device, make: Callable[[Any], Any], config: object) -> Any:
    """A model in evaluation mode whose weights are drawn on the device: a CPU takes its time with a billion."""
    with torch.device("meta"):
        model = make(config)
    model.to_empty(device=device)
    for weight in (*model.parameters(), *model.buffers()):  # buffers too: the null caption is one
        nn.init.normal_(weight, std=0.02)
    return model.eval()


def benchmark(device: torch.device) -> Iterator[tuple[str, str]]:
    """(what, in words) as `doctor` prints them: the ceilings, then the works with their share."""
    size = SIZES[device.type]
    dtype = autocast_type(pick_precision("auto", device, "precision", "training")) or torch.float32
    drawn_in = pick_precision("auto", device, "precision", "sampling")
    moved = copy_rate(device, size.copied)
    rates = {kind: product_rate(device, size.product, kind) for kind in {torch.float32, dtype}}
    words = ", ".join(f"{rate / 1e12:,.2f} TFLOP/s in {name_of(kind)}" for kind, rate in rates.items())
    yield "ceilings", f"a copy reads and writes {moved / 1e9:,.1f} GB/s; products: {words}"

    def line(what: str, run: Call, count: int, operations: int, kind: torch.dtype, read: int = 0) -> tuple[str, str]:
        """Of a call that does something `count` times, with so many operations and bytes in all."""
        products, memory, taken = operations / rates[kind], read / moved, median_seconds(run, device)
        bound = "products" if products > memory else "memory"
        share = f"{max(products, memory) / taken:4.0%} of {bound:8}"
        return "", f"{share} {1e3 * taken / count:9,.2f} ms  {what}, {name_of(kind)}"

    shape = size.generator
    yield "reached", f"of the ceiling; {shape.num_layers} layers of width {shape.width}, {size.tokenizer.image_size} px"
    kind = autocast_type(drawn_in) or torch.float32
    generator = tune(drawn_on(device, build_generator, shape)).to(kind)
    labels = torch.arange(size.rows, device=device)
    weights = sum(parameter.numel() for parameter in generator.blocks.parameters())
    read = weights_read(generator, 2 * size.rows) * kind.itemsize
    cache = generator.new_cache(2 * size.rows).data.nbytes * size.tokens // (2 * shape.num_tokens)  # on average
    sampler = decoder_of(generator, SamplerConfig(guidance_scale=2.0), num_tokens=size.tokens)  # captures once
    yield line(
        f"a token of {size.rows} guided rows", lambda: draw_batch(sampler, labels, range(size.rows)), size.tokens,
        2 * weights * 2 * size.rows * size.tokens, kind, int(size.tokens * (read + cache)),
    )  # fmt: skip
    tokenizer, side = drawn_on(device, MaskGITTokenizer, size.tokenizer), size.tokenizer.image_size
    rng = seeded(0, "doctor", device=device)
    tokens = integers(rng, 0, tokenizer.vocab_size, size.pictures, tokenizer.num_tokens)
    images = uniform(rng, size.pictures, 3, side, side) * 2 - 1
    decoder = with_weights(tokenizer, drawn_in, device)
    decode = torch.inference_mode()(lambda: decoder.decode(tokens))
    yield line("a picture decoded", decode, size.pictures, operations_of(decode), kind)
    encode = torch.inference_mode()(lambda: tokenizer.encode(images))
    yield line("a picture encoded", encode, size.pictures, operations_of(encode), torch.float32)
    step = training_step(drawn_on(device, build_generator, shape), size.step_rows, device, dtype)
    yield line(f"a training step of {size.step_rows} rows", step, 1, operations_of(step), dtype)


def name_of(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def training_step(generator: Any, rows: int, device: torch.device, dtype: torch.dtype) -> Call:
    """A step of plain AR as the training loop makes it."""
    config = AutoregressiveConfig()
    settings = TrainConfig(
        recipe="doctor", tokenizer="none", objective=config, optim=OptimConfig(), loop=LoopConfig(steps=1000)
    )
    world = World(0, 1, device)
    objective = method_of_config(config).objective(config, None, total_steps=1000, seed=0, world=world)
    trainee = Trainee(generator, ()).to(device).train()
    state = State(trainee, build_optimizer(trainee, settings.optim))
    tokens = integers(seeded(0, "doctor", device=device), 0, generator.vocab_size, rows, generator.num_tokens)
    batch: Any = TokenBatch(tokens, torch.arange(rows, device=device))
    tracker = Tracker(Path("none"), settings, enabled=False)
    run = Running(settings, Built(trainee, objective, batch), state, tracker, Path("none"), world)
    low = None if dtype is torch.float32 else dtype
    return lambda: update(run, trainee, objective.prepare(trainee, batch, state.step), low)
