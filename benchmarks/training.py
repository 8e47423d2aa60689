"""A training step of reAR against one of plain AR: same generator, batch and precision.

Run: python benchmarks/training.py. The tiny preset of the demo by default; `--preset S --layers 2` for the S shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from common import interleaved, optimiser_step, ratio, write_result

from consonar.components import load_tokenizer
from consonar.cpu import timing
from consonar.distributed import pick_device
from consonar.generators.rear import REAR_PRESETS, ReARGenerator
from consonar.precision import autocast_type, pick_precision
from consonar.seeding import draw_weights
from consonar.seeding import generator as seeded
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.training.trainee import Trainee
from consonar.types import TokenBatch


def make_step(
    objective_config: AutoregressiveConfig, args: argparse.Namespace, precision: str, dropout: float = 0.0
) -> Callable[[], None]:
    """One full optimiser step (rollout, forward, backward, clip, update) as a callable."""
    device = pick_device("auto")
    tokenizer = load_tokenizer("openmoji-64").to(device)
    shape = REAR_PRESETS[args.preset].sized(tokenizer.vocab_size, tokenizer.num_tokens, 10)
    shape = replace(shape, num_layers=args.layers or shape.num_layers, dropout=dropout)
    model = Trainee(ReARGenerator(shape), objective_config.head_specs(shape.num_layers, tokenizer.code_dim))
    model.generator.reset_parameters(seeded(0, "benchmark"))
    draw_weights(model.heads, rng=seeded(0, "benchmark_heads"))
    model.to(device).train()
    objective = Autoregressive(objective_config, tokenizer, total_steps=1000, seed=0)
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(tokenizer.vocab_size, (args.batch_size, tokenizer.num_tokens), generator=seeded(0, "tokens"))
    batch = TokenBatch(tokens.to(device), torch.arange(args.batch_size, device=device) % 10)
    dtype = autocast_type(pick_precision(precision, device, "precision", "training"))

    return optimiser_step(model, objective, optimizer, batch, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(REAR_PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="0: the preset's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    head_width = 256 if args.preset == "tiny" else 2048
    rear = AutoregressiveConfig(
        embedding_weight=1.0, head_width=head_width, noise=NoiseConfig(schedule="truncated_linear")
    )
    plain = make_step(AutoregressiveConfig(), args, "auto")

    def with_attention(plain_products: bool) -> None:
        with timing.forced("attention", plain_products):
            plain()

    dropping = make_step(AutoregressiveConfig(), args, "auto", dropout=0.1)

    def with_dropout(our_way: bool) -> None:
        with timing.forced("attention", our_way), timing.forced("dropout", our_way):
            dropping()

    steps = {}
    for fused in (True, False):
        with timing.forced("adamw", fused):
            steps[fused] = make_step(AutoregressiveConfig(), args, "auto")

    seconds = interleaved(
        {
            "plain AR": plain,
            "reAR": make_step(rear, args, "auto"),
            "plain AR fp32": make_step(AutoregressiveConfig(), args, "fp32"),
            "plain AR fused attention": lambda: with_attention(False),
            "plain AR plain products": lambda: with_attention(True),
            "plain AR dropout, ours": lambda: with_dropout(True),
            "plain AR dropout, PyTorch's": lambda: with_dropout(False),
            "plain AR fused AdamW": steps[True],
            "plain AR AdamW one by one": steps[False],
        },
        args.rounds,
    )
    figures = {
        "reAR / plain AR": round(ratio(seconds, "reAR", "plain AR"), 3),
        "fp32 / auto precision": round(ratio(seconds, "plain AR fp32", "plain AR"), 2),
        "fused attention / plain products": round(
            ratio(seconds, "plain AR fused attention", "plain AR plain products"), 2
        ),
        "dropout, PyTorch's / ours": round(ratio(seconds, "plain AR dropout, PyTorch's", "plain AR dropout, ours"), 2),
        "AdamW one by one / fused": round(ratio(seconds, "plain AR AdamW one by one", "plain AR fused AdamW"), 2),
        "chosen on this machine": timing.kept_answers(),
        "auto precision": pick_precision("auto", pick_device("auto"), "precision", "training"),
        "seconds": seconds,
    }
    config = {"preset": args.preset, "layers": args.layers, "batch_size": args.batch_size, "head_width": head_width}
    write_result(f"training_{args.preset}", config, 0, figures)


if __name__ == "__main__":
    main()
