"""A training step of one process against two on the same global batch, one thread each: DDP and shards (FSDP2).

Run: python benchmarks/processes.py. The tiny preset of the demo, float32, gloo; worlds take turns, `--rounds` times;
the first steps of each are not timed. The second process needs a core of its own.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
from common import ratio, write_result

from consonar.components import load_tokenizer
from consonar.distributed import joined, mean_over_ranks
from consonar.generators.rear import REAR_PRESETS, ReARGenerator
from consonar.parallel import ParallelConfig, shard, wrap
from consonar.seeding import generator as seeded
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.training.trainee import Trainee
from consonar.types import TokenBatch

WORLDS = {"one process": (1, "auto"), "two, DDP": (2, "ddp"), "two, FSDP2": (2, "fsdp")}
WARM_UP, TIMED = 3, 8


def steps(batch_size: int, strategy: str) -> None:
    """As a process of a world: prints the median seconds of a step, the mean over the processes."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        tokenizer = load_tokenizer("openmoji-64")
        shape = REAR_PRESETS["tiny"].sized(tokenizer.vocab_size, tokenizer.num_tokens, 10)
        trainee = Trainee(ReARGenerator(shape))
        trainee.generator.reset_parameters(seeded(0, "benchmark"))
        shard(trainee, trainee.parts(), ParallelConfig(strategy=strategy), world)
        model, optimizer = wrap(trainee.train(), world), build_optimizer(trainee, OptimConfig())
        objective = Autoregressive(AutoregressiveConfig(), tokenizer, total_steps=1000, seed=0, world=world)
        rows = (batch_size // world.size, tokenizer.num_tokens)
        tokens = torch.randint(tokenizer.vocab_size, rows, generator=seeded(0, f"tokens {world.rank}"))
        batch, seconds = TokenBatch(tokens, torch.arange(len(tokens)) % 10), []
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            loss, _ = objective.loss(model, objective.prepare(trainee, batch, 1), 1)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
        mean = mean_over_ranks({"seconds": statistics.median(seconds[WARM_UP:])}, world)
        if world.is_main:
            print(mean["seconds"])


def measure(batch_size: int, size: int, strategy: str) -> float:
    """Seconds of a step in a world of so many processes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--batch-size", str(batch_size), "--strategy", strategy]
    started = [
        subprocess.Popen(
            command, env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "a process failed; see above"
    return float(printed[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", help="what a process that this script starts is told")
    args = parser.parse_args()
    if args.strategy:
        steps(args.batch_size, args.strategy)
        return
    seconds: dict[str, list[float]] = {name: [] for name in WORLDS}
    for _ in range(args.rounds):
        for name, (size, strategy) in WORLDS.items():
            seconds[name].append(measure(args.batch_size, size, strategy))
    figures = {f"one process / {name}": round(ratio(seconds, "one process", name), 2) for name in list(WORLDS)[1:]}
    write_result("processes", {"batch_size": args.batch_size}, 0, {**figures, "seconds": seconds})


if __name__ == "__main__":
    main()
