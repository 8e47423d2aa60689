"""What a training step of reAR takes a token over batch, length and width, and what recomputing blocks saves and costs,
each beside what `consonar plan` counts for it.

Run: python benchmarks/cost.py. One thread and its processor time, so that a busy machine does not matter much; no
dropout. Lengths have equally many tokens in a batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import interleaved, optimiser_step, ratio, write_result
from torch.profiler import ProfilerActivity, profile

from consonar.components import load_tokenizer
from consonar.cpu import timing
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.planning.shapes import shapes_of
from consonar.planning.update import update
from consonar.precision import autocast_type, pick_precision
from consonar.seeding import draw_weights
from consonar.seeding import generator as seeded
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.training.trainee import Trainee
from consonar.types import TokenBatch

REAR = AutoregressiveConfig(
    embedding_weight=1.0, head_width=256, class_dropout=0.0, noise=NoiseConfig(schedule="truncated_linear")
)
NUM_CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A step; the defaults are the middle of every row."""

    batch: int = 16
    length: int = 256
    width: int = 512
    layers: int = 2
    recomputed: int = 0

    @property
    def config(self) -> TrainConfig:
        shape = ReARConfig(
            width=self.width, num_layers=self.layers, num_heads=self.width // 64, dropout=0.0, num_tokens=self.length
        )
        loop = LoopConfig(batch_size=self.batch, activation_checkpointing=self.recomputed)
        return TrainConfig(recipe="cost", tokenizer="openmoji-64", model=shape, objective=REAR, loop=loop)


MIDDLE = Case()
COST = {
    **{f"batch {batch}": replace(MIDDLE, batch=batch) for batch in (4, 16, 64)},
    **{f"length {length}": replace(MIDDLE, length=length, batch=4096 // length) for length in (64, 1024)},
    **{f"width {width}": replace(MIDDLE, width=width) for width in (256, 1024)},
}
MEMORY = {
    name: Case(batch=8, layers=8, recomputed=every) for name, every in {"none": 0, "every second": 2, "all": 1}.items()
}


def made(case: Case, dtype: torch.dtype | None) -> tuple[Trainee, Autoregressive, TokenBatch]:
    """What a step trains, minimises and reads."""
    tokenizer = load_tokenizer("openmoji-64")
    _, shapes, _ = shapes_of(case.config, NUM_CLASSES)
    assert isinstance(shapes.generator, ReARConfig)  # `config`
    model = Trainee(ReARGenerator(shapes.generator), shapes.heads)
    model.generator.reset_parameters(seeded(0, "benchmark"))
    draw_weights(model.heads, rng=seeded(0, "benchmark_heads"))
    model.generator.recompute_every = case.recomputed
    tokens = torch.randint(tokenizer.vocab_size, (case.batch, case.length), generator=seeded(0, "tokens"))
    objective = Autoregressive(REAR, tokenizer, total_steps=1000, seed=0)
    return model.train(), objective, TokenBatch(tokens, torch.arange(case.batch) % NUM_CLASSES)


def planned(case: Case, low: bool) -> tuple[int, int]:
    """(FLOPs, most bytes beside weights and optimizer) of the step, as `consonar plan` has them for a CPU."""
    config, shapes, _ = shapes_of(case.config, NUM_CLASSES)
    found = update(config, shapes, case.batch, low=low, cuda=False)
    return found.flops.total(), found.peak.total()


def step_of(case: Case, dtype: torch.dtype | None) -> Callable[[], None]:
    model, objective, batch = made(case, dtype)
    return optimiser_step(model, objective, build_optimizer(model, OptimConfig()), batch, dtype)


def passes_of(case: Case, dtype: torch.dtype | None) -> Callable[[], None]:
    """Both passes without the optimizer."""
    model, objective, batch = made(case, dtype)

    def passes() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, _ = objective.loss(model, objective.prepare(model, batch, 1), 1)
        torch.autograd.backward(loss)
        model.zero_grad(set_to_none=True)

    return passes


def most_bytes(run: Callable[[], None]) -> int:
    """The most that lives at once of what a call makes, by PyTorch's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    recorded = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    precision = pick_precision(args.precision, torch.device("cpu"), "precision", "training")
    dtype = autocast_type(precision)
    seconds = interleaved(
        {name: step_of(case, dtype) for name, case in COST.items()}, args.rounds, clock=time.process_time
    )
    cost = {}
    for name, case in COST.items():
        tokens, flops = case.batch * case.length, planned(case, dtype is not None)[0]
        taken = statistics.median(seconds[name])
        cost[name] = {
            "microseconds a token": round(taken / tokens * 1e6, 1), "MFLOP a token": round(flops / tokens / 1e6, 1),
            "GFLOP/s": round(flops / taken / 1e9, 1),
        }  # fmt: skip
    with timing.forced("attention", False):  # what a plan is of
        passes = {name: passes_of(case, dtype) for name, case in MEMORY.items()}
        taken = interleaved(passes, args.rounds, clock=time.process_time)
        memory = {
            name: {
                "MB": round(most_bytes(passes[name]) / 1e6), "MB planned": round(found[1] / 1e6),
                "time": round(ratio(taken, name, "none"), 2),
                "FLOPs": round(found[0] / planned(MEMORY["none"], dtype is not None)[0], 2),
            }
            for name, case in MEMORY.items()
            if (found := planned(case, dtype is not None))
        }  # fmt: skip
    config = {"middle": vars(MIDDLE), "memory": vars(MEMORY["none"]), "head_width": REAR.head_width}
    figures = {"precision": precision, "cost": cost, "recomputed blocks": memory}
    write_result("cost", config, 0, {**figures, "processor seconds": {**seconds, **taken}})


if __name__ == "__main__":
    main()
