"""What every benchmark shares: interleaved timing of alternatives in one run, and a result file with its provenance."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consonar.distributed import machine_name
from consonar.evaluation.results import library_versions
from consonar.types import Objective

RESULTS = Path(__file__).parent / "results"


def interleaved(
    alternatives: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each alternative, `rounds` times in turn after one warm-up each, so that drift hits all alike."""
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def write_result(name: str, config: dict[str, Any], seed: int, figures: dict[str, Any]) -> None:
    """Prints the figures and writes benchmarks/results/NAME.json with configuration, seed, versions and machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "benchmark": name,
        "figures": figures,
        "config": config,
        "seed": seed,
        "versions": library_versions(),
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def optimiser_step(
    model: nn.Module, objective: Objective[Any, Any], optimizer: torch.optim.Optimizer, batch: Any,
    dtype: torch.dtype | None,
) -> Callable[[], None]:  # fmt: skip
    """A whole step as a callable: preparation, forward (under autocast with a dtype), backward, clipping, update."""
    device = next(model.parameters()).device.type

    def step() -> None:
        prepared = objective.prepare(model, batch, 1)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss, _ = objective.loss(model, prepared, 1)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
