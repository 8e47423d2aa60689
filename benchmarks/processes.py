"""A training step of one process against two on the same global batch, one thread each: DDP and shards (FSDP2).

Two processes that do not speak, each alone with half of the batch at the same time, are the ceiling: the step has parts
that do not halve (AdamW), and processes share the memory's bandwidth. Run: python benchmarks/processes.py. The tiny
preset of the demo, float32, gloo; worlds take turns, `--rounds` times; the first steps of each are not timed. The
second process needs a core of its own; beside the seconds stand those of the processor, which waiting is not in.
"""

from __future__ import annotations

import argparse
import json
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

KEPT = "two, FSDP2, weights kept whole until the backward pass"
WORLDS = {
    "one process": (1, ParallelConfig()),
    "two that do not speak": (2, None),
    "two, DDP": (2, ParallelConfig(strategy="ddp")),
    "two, FSDP2": (2, ParallelConfig(strategy="fsdp")),
    KEPT: (2, ParallelConfig(strategy="fsdp", reshard_after_forward=False)),
}
"""Processes, and how they share; None: not at all."""
WARM_UP, TIMED = 3, 8


def steps(batch_size: int, config: ParallelConfig) -> None:
    """As a process of a world: prints the median seconds of a step, and of its processor, the mean over all."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        tokenizer = load_tokenizer("openmoji-64")
        shape = REAR_PRESETS["tiny"].sized(tokenizer.vocab_size, tokenizer.num_tokens, 10)
        trainee = Trainee(ReARGenerator(shape))
        trainee.generator.reset_parameters(seeded(0, "benchmark"))
        shard(trainee, trainee.parts(), config, world)
        model, optimizer = wrap(trainee.train(), world), build_optimizer(trainee, OptimConfig())
        objective = Autoregressive(AutoregressiveConfig(), tokenizer, total_steps=1000, seed=0, world=world)
        rows = (batch_size // world.size, tokenizer.num_tokens)
        tokens = torch.randint(tokenizer.vocab_size, rows, generator=seeded(0, f"tokens {world.rank}"))
        batch, seconds, processor = TokenBatch(tokens, torch.arange(len(tokens)) % 10), [], []
        for _ in range(WARM_UP + TIMED):
            start, busy = time.perf_counter(), time.process_time()
            loss, _ = objective.loss(model, objective.prepare(trainee, batch, 1), 1)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
        found = {"seconds": seconds, "processor": processor}
        print(json.dumps(mean_over_ranks({k: statistics.median(v[WARM_UP:]) for k, v in found.items()}, world)))


def measure(name: str, batch_size: int) -> dict[str, float]:
    """Seconds of a step in a world, as a process of it prints them."""
    size, config = WORLDS[name]
    if config is None:
        batch_size //= size
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--batch-size", str(batch_size), "--world", name]
    started = []
    for rank in range(size):
        if config is not None:
            world |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=os.environ | world, stdout=subprocess.PIPE, text=True))
    printed = [json.loads(process.communicate()[0]) for process in started]
    assert not any(process.returncode for process in started), "a process failed; see above"
    return {key: statistics.mean(each[key] for each in printed) for key in printed[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", help="what a process that this script starts is told")
    args = parser.parse_args()
    if args.world:
        steps(args.batch_size, WORLDS[args.world][1] or ParallelConfig())
        return
    found: dict[str, dict[str, list[float]]] = {"seconds": {}, "processor": {}}
    for _ in range(args.rounds):
        for name in WORLDS:
            for clock, value in measure(name, args.batch_size).items():
                found[clock].setdefault(name, []).append(value)
    figures = {
        clock: {f"one process / {name}": round(ratio(taken, "one process", name), 2) for name in list(WORLDS)[1:]}
        for clock, taken in found.items()
    }
    write_result("processes", {"batch_size": args.batch_size}, 0, {"ratios": figures, **found})


if __name__ == "__main__":
    main()
