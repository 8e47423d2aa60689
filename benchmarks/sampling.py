"""Sampling with the key-value cache against recomputing the prefix for every token: S preset's shape, 256 tokens.

Fewer layers than the preset on a CPU (both sides alike). Run: python benchmarks/sampling.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import interleaved, ratio, write_result

from consonar.cpu.kernels import tune
from consonar.generators.rear import REAR_PRESETS, ReARGenerator
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded


@torch.inference_mode()
def recompute_greedy(model: ReARGenerator, condition: torch.Tensor) -> torch.Tensor:
    """The alternative: every token runs the whole prefix again. (B, N) most likely tokens."""
    tokens = torch.zeros(len(condition), model.num_tokens, dtype=torch.int64, device=condition.device)
    for position in range(model.num_tokens):
        # Row `position` of the logits does not see the placeholder that stands at `position`.
        logits, _ = model(tokens[:, : position + 1], condition)
        tokens[:, position] = logits[:, -1].argmax(-1)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20 if torch.cuda.is_available() else 2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = replace(REAR_PRESETS["S"].sized(1024, 256, 1000), num_layers=args.layers)
    model = tune(ReARGenerator(config))
    model.reset_parameters(seeded(0, "benchmark"))
    model = model.to(device).eval()
    condition = torch.arange(args.batch_size, device=device)
    greedy = SamplerConfig(temperature=0)
    cached, _ = sample_tokens(model, condition, range(args.batch_size), greedy)
    same = float((cached == recompute_greedy(model, condition)).float().mean())
    seconds = interleaved(
        {
            "cache": lambda: sample_tokens(model, condition, range(args.batch_size), greedy),
            "recompute": lambda: recompute_greedy(model, condition),
        },
        args.rounds,
    )
    figures = {
        "recompute / cache": round(ratio(seconds, "recompute", "cache"), 2),
        "equal tokens": same,
        "seconds": seconds,
    }
    write_result(
        "sampling", {"preset": "S", "layers": args.layers, "tokens": 256, "batch_size": args.batch_size}, 0, figures
    )


if __name__ == "__main__":
    main()
