"""What memory costs on a CPU: `keep_freed_memory`, huge pages and the feature network without copies, against without.

Every measurement runs in a process of its own, since the allocator's settings are the process's; alternatives take
turns. Linux with glibc. Run: python benchmarks/allocator.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from common import ratio, write_result
from training import make_step

from consonar.components import load_tokenizer
from consonar.cpu import ask_for_huge_pages, keep_freed_memory
from consonar.networks import efficientnet, load_feature_network
from consonar.seeding import generator as seeded
from consonar.training.objectives.autoregressive import AutoregressiveConfig

IMAGES = 128


def features() -> Callable[[], object]:
    network = load_feature_network("efficientnet-lite0")
    images = torch.rand(IMAGES, 3, 64, 64, generator=seeded(0, "images")) * 2 - 1
    return lambda: network(images)


def features_with_copies() -> Callable[[], object]:
    """As the package has it: padding as an operation of its own, activations into new memory."""
    efficientnet.spare_copies = lambda network: None
    return features()


def decoding() -> Callable[[], object]:
    tokenizer = load_tokenizer("openmoji-64")
    tokens = torch.randint(tokenizer.vocab_size, (IMAGES, tokenizer.num_tokens), generator=seeded(0, "tokens"))
    return torch.inference_mode()(lambda: tokenizer.decode(tokens))


def training() -> Callable[[], object]:
    return make_step(AutoregressiveConfig(), Namespace(preset="tiny", layers=0, batch_size=64), "auto")


TASKS: dict[str, Callable[[], Callable[[], object]]] = {
    "features": features,
    "features, with copies": features_with_copies,
    "decoding": decoding,
    "training step": training,
}
# Name of an alternative to its task and the options of the child: whether freed memory is kept, and in huge pages.
ALTERNATIVES = {
    f"{task}, {name}": (task, options)
    for name, options in {"default": [], "kept": ["--keep"], "kept, huge pages": ["--keep", "--huge"]}.items()
    for task in TASKS
}


def run_task(task: str, keep: bool, huge: bool, repeats: int) -> None:
    """In the child: prints the median of `repeats` timings after two warm-ups."""
    if keep and not keep_freed_memory():
        sys.exit("the C library is not glibc")
    if huge:
        ask_for_huge_pages()
    run = TASKS[task]()
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(statistics.median(seconds[2:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--task", choices=list(TASKS), help="measure this one here; the benchmark calls itself so")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--huge", action="store_true")
    args = parser.parse_args()
    if args.task:
        run_task(args.task, args.keep, args.huge, args.repeats)
        return
    seconds: dict[str, list[float]] = {name: [] for name in ALTERNATIVES}
    for _ in range(args.rounds):
        for name, (task, options) in ALTERNATIVES.items():
            command = [sys.executable, __file__, "--task", task, "--repeats", str(args.repeats), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[name].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        f"{task}: default / kept": round(ratio(seconds, f"{task}, default", f"{task}, kept"), 2) for task in TASKS
    }
    for task in TASKS:
        figures[f"{task}: kept / kept, huge pages"] = round(
            ratio(seconds, f"{task}, kept", f"{task}, kept, huge pages"), 2
        )
    figures["features: with copies / without, kept"] = round(
        ratio(seconds, "features, with copies, kept", "features, kept"), 2
    )
    figures["features: with copies, default / without, kept"] = round(
        ratio(seconds, "features, with copies, default", "features, kept"), 2
    )
    config = {"images": IMAGES, "rounds": args.rounds, "repeats": args.repeats}
    write_result("allocator", config, 0, figures | {"seconds": seconds})


if __name__ == "__main__":
    main()
