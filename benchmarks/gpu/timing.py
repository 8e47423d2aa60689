"""Sampling, decoding, training and VA-pi on a CUDA device against the ceilings measured in the same run.

Every stage writes one line of JSON to $OUT/timing.jsonl as soon as it is done; one that fails or has no time left
writes `error` or `skipped`, and the others go on. Models have random weights: time does not depend on them.

Run: OUT=FOLDER SECONDS_LEFT=170 PYTHONPATH=src:tests python benchmarks/gpu/timing.py; with PRETEND=1 on the pretended
device, with TOY=1 at sizes that take a second on a CPU, where the figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from device.pretend import pretended_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from rear_released import Released, pytorchs_own
from versus import compare, published_llamagen, published_rear, published_vapi, rollout

from consonar import distributed
from consonar.cli.ceilings import copy_rate, drawn_on, operations_of, product_rate, weights_read
from consonar.compiling import compile_for_training, compiled
from consonar.distributed import World, pick_device
from consonar.evaluation.results import library_versions
from consonar.generators import build_generator
from consonar.generators.base import GeneratorConfig
from consonar.generators.llamagen import LLAMAGEN_PRESETS
from consonar.generators.rear import REAR_PRESETS
from consonar.networks.lpips import LPIPS, VGG16Features
from consonar.planning.plan import Machine, plan
from consonar.precision import multiplying, with_weights
from consonar.recipes.published import PLAIN, REGULARISED
from consonar.sampling.sample import SamplerConfig, decoder_of, draw_batch
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer
from consonar.training.checkpoints import State
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.loop import Built, Running, update
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.base import ObjectiveConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.optim import OptimConfig, build_optimizer, parameter_groups
from consonar.training.rewards import PlacedReward, Rewards, squared_errors
from consonar.training.tracking import Tracker
from consonar.training.trainee import Trainee
from consonar.types import Grid, ImageBatch, TextCondition, TokenBatch

RELEASED_VQ = VQConfig(
    vocab_size=16384, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2, latent_channels=256
)
FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Without cuDNN's attention, which PyTorch prefers on some devices."""
BF16 = torch.bfloat16
TOY_CODEC: dict[str, Any] = {"base_channels": 32, "image_size": 32}
Call = Callable[[], object]


class Bench:
    """The device, what it can do at most, and where the lines go."""

    def __init__(self, device: torch.device, folder: Path, seconds: float, toy: bool):
        self.device, self.toy, self.deadline = device, toy, time.monotonic() + seconds
        self.file, self.failed = folder / "timing.jsonl", False
        self.bytes_per_second = self.products_per_second = float("nan")

    def emit(self, name: str, **figures: Any) -> None:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
        line = json.dumps({"name": name, **rounded})
        print(line, flush=True)
        with self.file.open("a") as lines:
            lines.write(line + "\n")

    def stage(self, name: str, run: Callable[[Bench], dict[str, Any]]) -> None:
        """Writes what `run` measured, or why there is nothing."""
        if time.monotonic() > self.deadline:
            return self.emit(name, skipped="no time left")
        try:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            figures = run(self)
            self.emit(name, **figures, peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        except Exception as error:  # whatever it is: the stages after it are worth their minutes
            self.failed = True
            self.emit(name, error=f"{type(error).__name__}: {str(error)[:300]}")

    def measured(self, run: Call, images: int, rounds: int = 3, operations: int = 0) -> dict[str, float]:
        """Seconds of the first call, which makes plans and handles, and the median of `rounds` after it."""
        first, *times = [self.seconds(run) for _ in range(2 if self.toy else rounds + 1)]
        seconds = statistics.median(times)
        figures = {"first_s": first, "seconds": seconds, "images_per_s": images / seconds}
        if operations:
            figures["share_of_products"] = operations / seconds / self.products_per_second
        return figures

    def seconds(self, run: Call) -> float:
        """Of one call, from an idle device to an idle device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def sized(self, preset: GeneratorConfig, vocab_size: int, side: int) -> GeneratorConfig:
        """The preset for side x side tokens; one narrow layer and 2 x 2 tokens where this is a toy."""
        if self.toy:
            preset, side = replace(preset, num_layers=1, width=64, num_heads=4), 2
        return preset.sized(vocab_size, side * side, 1000, grid=Grid(side, side))

    def made(self, make: Callable[[Any], Any], config: Any) -> Any:
        return drawn_on(self.device, make, config)


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures are of, and the ceilings: bytes that a copy reads and writes, bf16 operations of a product."""
    size, width = (2**20, 64) if bench.toy else (2**30, 8192)
    bench.bytes_per_second = copy_rate(bench.device, size)
    bench.products_per_second = product_rate(bench.device, width, BF16)
    return {
        "gpu": torch.cuda.get_device_name(bench.device), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **library_versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "attention_order": str(torch._C._get_sdp_priority_order()), "toy": bench.toy,
        "tb_per_s": bench.bytes_per_second / 1e12, "bf16_tflops": bench.products_per_second / 1e12,
    }  # fmt: skip


def sampling(
    preset: GeneratorConfig, vocab_size: int, side: int, rows: int, dtype: torch.dtype,
    backends: Sequence[SDPBackend], graphs: bool, bench: Bench,
) -> dict[str, Any]:  # fmt: skip
    """Guided tokens of `rows` images, of classes or captions. The floor: the blocks' weights and the cache of all rows,
    read once a token.

    `graphs`: one launch a token, captured in the first call; `captured` says how many there are (0: none was made).
    """
    config = bench.sized(preset, vocab_size, side)
    rows = 2 if bench.toy else rows
    model = bench.made(build_generator, config).to(dtype)
    condition = torch.arange(rows, device=bench.device)
    if not config.has_classes:
        features = torch.randn(rows, config.prefix_length, config.caption_dim, device=bench.device)
        # Captions of all lengths, padded on the left.
        shown = torch.arange(config.prefix_length, device=bench.device) >= condition[:, None] % config.prefix_length
        condition = TextCondition(features, shown)
    decoder = decoder_of(model, SamplerConfig(guidance_scale=2.0), graphs=graphs)

    def run() -> None:
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            draw_batch(decoder, condition, range(rows))

    figures = bench.measured(run, rows, rounds=2)
    weights = weights_read(model, 2 * rows) * dtype.itemsize
    prefix = config.prefix_length
    filled = (prefix + config.num_tokens / 2) / (prefix + config.num_tokens)  # in the mean
    cache = model.new_cache(2 * rows).data.nbytes * filled
    floor = config.num_tokens * (weights + cache) / bench.bytes_per_second
    per_token = 1e3 * figures["seconds"] / config.num_tokens
    figures["captured"] = sum(len(batch.replays) for batch in decoder.batches.values())
    return {**figures, "ms_per_token": per_token, "floor_s": floor, "share_of_floor": floor / figures["seconds"]}


def coding(mode: str, network: str, bench: Bench) -> dict[str, Any]:
    """128 pictures of 256 px by MaskGIT's decoder (`network` pixels) or encoder (latents). `mode`: tf32, ieee, bf16
    weights, or those with channels last, as sampling has them; ending in `compiled`, as --compile does it, of which
    `compiled` says whether that worked."""
    config = MaskGITConfig(**TOY_CODEC) if bench.toy else MaskGITConfig()
    tokenizer = bench.made(MaskGITTokenizer, config)
    if mode.startswith("bf16"):
        tokenizer = with_weights(tokenizer, "bf16", bench.device) if mode != "bf16" else tokenizer.to(BF16)
    pictures = 1 if bench.toy else 128
    tokens = torch.randint(config.vocab_size, (pictures, tokenizer.num_tokens), device=bench.device)
    images = torch.rand(pictures, 3, config.image_size, config.image_size, device=bench.device) * 2 - 1

    @torch.inference_mode()
    def run(codec: MaskGITTokenizer) -> None:
        codec.decode(tokens) if network == "pixels" else codec.encode(images)

    with multiplying("tf32" if mode == "tf32" else "fp32", bench.device):
        operations = operations_of(partial(run, tokenizer))
        if "compiled" not in mode or bench.toy:
            return bench.measured(partial(run, tokenizer), pictures, operations=operations)
        own = compiled(tokenizer, network)
        figures = bench.measured(partial(run, own), pictures, operations=operations)
        return {**figures, "compiled": vars(own)[network].rows == pictures}


def step_of(
    trainee: Any, objective: Any, config: ObjectiveConfig, batch: Any, bench: Bench,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:  # fmt: skip
    """One step of the loop in bf16, all that it does between two batches."""
    settings = TrainConfig(
        recipe="timing", tokenizer="timing", objective=config, optim=OptimConfig(lr=1e-6, min_lr=1e-6),
        loop=LoopConfig(steps=1000),
    )  # fmt: skip
    state = State(trainee, optimizer or build_optimizer(trainee, settings.optim))
    tracker = Tracker(Path("no run"), settings, enabled=False)
    run = Running(settings, Built(trainee, objective, batch), state, tracker, Path("no run"), World(0, 1, bench.device))

    def step() -> None:
        prepared = objective.prepare(trainee, batch, state.step)
        update(run, trainee, prepared, BF16)

    return step


def token_step(
    preset: GeneratorConfig, vocab_size: int, side: int, rows: int, config: ObjectiveConfig, bench: Bench,
    released: bool = False,
) -> tuple[Any, Callable[[], None]]:  # fmt: skip
    """What is trained on tokens, and a step of it; `released`: reAR's arithmetic and optimizer as published."""
    shape = bench.sized(preset, vocab_size, side)
    coded = MaskGITConfig(vocab_size=vocab_size, **TOY_CODEC if bench.toy else {})
    tokenizer = bench.made(MaskGITTokenizer, coded).requires_grad_(False)
    specs = config.head_specs(shape.num_layers, tokenizer.code_dim)
    make = Released if released else build_generator
    trainee = bench.made(lambda shape: Trainee(make(shape), specs), shape).train()
    objective = method_of_config(config).objective(
        config, tokenizer, total_steps=1000, seed=0, world=World(0, 1, bench.device)
    )
    tokens = torch.randint(vocab_size, (rows, shape.num_tokens), device=bench.device)
    batch = TokenBatch(tokens, torch.arange(rows, device=bench.device))
    optimizer = torch.optim.AdamW(parameter_groups(trainee, OptimConfig().weight_decay)) if released else None
    return trainee, step_of(trainee, objective, config, batch, bench, optimizer)


def training(
    preset: GeneratorConfig, vocab_size: int, side: int, rows: int, config: ObjectiveConfig, bench: Bench
) -> dict[str, Any]:
    """A step on tokens."""
    rows = 2 if bench.toy else rows
    _, step = token_step(preset, vocab_size, side, rows, config, bench)
    return bench.measured(step, rows, rounds=4, operations=operations_of(step))


def published_training(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, bench: Bench) -> dict[str, Any]:
    """A step of reAR against the released forward and loss; the blocks of either are compiled."""
    rows = 2 if bench.toy else rows
    shape = (preset, vocab_size, side, rows, REGULARISED, bench)
    (trainee, step), (other, released) = token_step(*shape), token_step(*shape, released=True)
    operations = operations_of(step)
    if not bench.toy:
        other.generator.one_block = torch.compile(other.generator.one_block)
        for part in trainee.parts():
            compile_for_training(part)

    def theirs() -> None:
        with pytorchs_own():
            released()

    first = {"first_s": bench.seconds(step), "released_first_s": bench.seconds(theirs)}
    figures = compare({"ours": step, "released": theirs}, bench, rounds=4)
    taken = statistics.median(figures["seconds"]["ours"])
    return {**first, **figures, "share_of_products": operations / taken / bench.products_per_second}


def memory(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, every: int, bench: Bench) -> dict[str, Any]:
    """The most memory of two steps of plain AR, of which every so many-th block is calculated again (0: none), beside
    what `consonar plan` says of them."""
    rows = 2 if bench.toy else rows
    trainee, step = token_step(preset, vocab_size, side, rows, PLAIN, bench)
    trainee.generator.recompute_every = every
    figures = bench.measured(step, rows, rounds=1)
    loop = LoopConfig(batch_size=rows, activation_checkpointing=every, precision="bf16")
    given = TrainConfig(
        recipe="timing", tokenizer="hf:llamagen-vq16-c2i", model=trainee.generator.config, objective=PLAIN, loop=loop
    )
    return {**figures, "planned_gib": plan(given, Machine()).peak / 2**30}


def vapi(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, group: int, bench: Bench) -> dict[str, Any]:
    """A VA-pi step with LPIPS and squared error as rewards; the same with chunks of pictures one after the other; the
    seconds of its parts, each from an idle device to an idle one."""
    shape = bench.sized(preset, vocab_size, side)
    vq = replace(RELEASED_VQ, image_size=16 * side)
    if bench.toy:
        rows, group = 1, 2  # in bf16 LPIPS takes a CPU without it half a second a picture
        vq = replace(vq, image_size=32, base_channels=32, latent_channels=32)
    tokenizer = bench.made(VQTokenizer, vq).requires_grad_(False)
    config = PolicyConfig(rewards={"mse": 1.0}, group_size=group, chunk=1 if bench.toy else 16)
    objective = method_of_config(config).objective(
        config, tokenizer, None, total_steps=1000, seed=0, world=World(0, 1, bench.device), autocast_dtype=BF16
    )
    distance = LPIPS(VGG16Features(), "drawn").to(bench.device)
    rewards = {"mse": PlacedReward(squared_errors), "lpips": PlacedReward(distance.maps)}
    objective.rewards = Rewards(rewards, dict.fromkeys(rewards, 1.0), chunk=config.chunk)
    trainee = AlignmentTrainee(bench.made(build_generator, shape)).to(bench.device)
    images = torch.rand(rows, 3, vq.image_size, vq.image_size, device=bench.device) * 2 - 1
    batch = ImageBatch(images, torch.arange(rows, device=bench.device))
    step = step_of(trainee, objective, config, batch, bench)
    operations = operations_of(step)
    figures = bench.measured(step, rows, operations=operations)
    with patch.object(distributed, "beside", lambda *_: nullcontext()):
        figures["one_stream_s"] = bench.seconds(step)
    owners = {"encode": (objective, "encode"), "decode": (objective, "decode"), "judge": (objective.rewards, "_chunk")}
    parts = {name: timed(*method, bench) for name, method in owners.items()}
    step()
    return {**figures, **{f"{name}_s": sum(times) for name, times in parts.items()}}


def timed(owner: Any, name: str, bench: Bench) -> list[float]:
    """Puts a clock around a method; the seconds of each call from now on."""
    inner, times = getattr(owner, name), []

    def call(*args: Any, **settings: Any) -> Any:
        results: list[Any] = []
        times.append(bench.seconds(lambda: results.append(inner(*args, **settings))))
        return results[0]

    setattr(owner, name, call)
    return times


S, L = ((REAR_PRESETS[name], 1024, 16) for name in "SL")
LAST = "bf16, channels last"
XL, XXL, XXXL = ((LLAMAGEN_PRESETS[name], RELEASED_VQ.vocab_size, 24) for name in ("XL", "XXL", "XXXL"))
CAPTIONS = (replace(LLAMAGEN_PRESETS["XL"], condition="text"), RELEASED_VQ.vocab_size, 16)
STAGES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "machine": machine,
    "sample reAR-S, 128 rows, float32": partial(sampling, *S, 128, torch.float32, (), True),
    "sample reAR-S, 128 rows, bf16": partial(sampling, *S, 128, BF16, (), True),
    "sample reAR-S, 128 rows, bf16, no graph": partial(sampling, *S, 128, BF16, (), False),
    "sample reAR-S, 128 rows, bf16, flash first": partial(sampling, *S, 128, BF16, FLASH_FIRST, True),
    **{f"decode MaskGIT, {mode}": partial(coding, mode, "pixels") for mode in ("ieee", "tf32", "bf16", LAST)},
    "encode MaskGIT, ieee": partial(coding, "ieee", "latents"),
    "train reAR-S, 128 rows": partial(training, *S, 128, REGULARISED),
    "train reAR-S, 128 rows, plain AR": partial(training, *S, 128, PLAIN),
    "VA-pi LlamaGen-XL, 8 pictures of 384 px, G 8": partial(vapi, *XL, 8, 8),
    "sample LlamaGen-XL, 32 rows of 576 tokens, bf16": partial(sampling, *XL, 32, BF16, (), True),
    "train LlamaGen-XL, 8 rows of 576 tokens, plain AR": partial(training, *XL, 8, PLAIN),
    "LlamaGen-XL, 32 rows, against RAR's and LlamaGen's samplers": partial(published_llamagen, *XL, 32),
    "VA-pi LlamaGen-XL against the released step": partial(published_vapi, XL[0], RELEASED_VQ, 24, 8, 8),
    "train reAR-S, 128 rows, compiled, against the released step": partial(published_training, *S, 128),
    "reAR-S, 16 rows, against no cache": partial(published_rear, *S, 16),
    f"decode MaskGIT, {LAST}, compiled": partial(coding, f"{LAST}, compiled", "pixels"),
    "rollout of AR-GRPO, LlamaGen-XL, 32 rows, against no graphs": partial(rollout, *XL, 32),
    "sample LlamaGen-XL by captions, 32 rows, bf16": partial(sampling, *CAPTIONS, 32, BF16, (), True),
    "memory of LlamaGen-XXL, 8 rows of 576 tokens": partial(memory, *XXL, 8, 0),
    "memory of LlamaGen-XXL, 8 rows, checkpointed": partial(memory, *XXL, 8, 1),
    "memory of LlamaGen-XXXL, 8 rows, checkpointed": partial(memory, *XXXL, 8, 1),
    "train reAR-L, 64 rows": partial(training, *L, 64, REGULARISED),
    "sample reAR-L, 128 rows, bf16": partial(sampling, *L, 128, BF16, (), True),
    "VA-pi LlamaGen-XXL, 8 pictures of 384 px, G 8": partial(vapi, *XXL, 8, 8),
    "encode MaskGIT, ieee, compiled": partial(coding, "ieee, compiled", "latents"),
    "VA-pi LlamaGen-XXL against the released step": partial(published_vapi, XXL[0], RELEASED_VQ, 24, 8, 8),
    "memory of LlamaGen-XXXL, 8 rows of 576 tokens": partial(memory, *XXXL, 8, 0),
}
"""In the order of what is worth most: the last ones may find no time left."""


def main() -> None:
    folder, seconds = Path(os.environ.get("OUT", ".")), float(os.environ.get("SECONDS_LEFT", 200))
    with ExitStack() as stack:
        if os.environ.get("PRETEND"):
            stack.enter_context(pretended_cuda())
        bench = Bench(pick_device("cuda"), folder, seconds, toy=bool(os.environ.get("TOY")))
        stack.enter_context(multiplying("fp32", bench.device))
        for name, run in STAGES.items():
            bench.stage(name, run)
    if bench.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
