"""One VA-pi update with a shared context against the released arithmetic, and where its time goes as G grows.

The alternative, written out here as the released trainer calculates it: one pass without gradient to draw, then one
pass with gradient for each of the B x G samples, in micro-batches of 8 rows, and one pass of the start model for each
sample whether its KL is used or not. Both alternatives draw the same tokens, decode with the same tokenizer and use the
same rewards and optimizer; their gradients are compared before they are timed.

Run: python benchmarks/vapi.py. LlamaGen-B's width with fewer layers, on the shipped tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, ratio, write_result
from torch import Tensor

from consonar.components import load_tokenizer
from consonar.distributed import World, pick_device
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.precision import autocast_type, pick_precision
from consonar.seeding import generator as seeded
from consonar.training import losses
from consonar.training import policy_gradient as policy
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.policy import PolicyConfig, PolicyForced, TeacherForcedPolicy
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.types import ImageBatch, Tokenizer

MICRO_BATCH = 8
REWARDS = {"mse": 1.0, "efficientnet-lite0": 1.0}


class Bench:
    """Model, batch and objective of one group size, and the two ways to make an update."""

    def __init__(self, model: LlamaGenGenerator, tokenizer: Tokenizer, config: PolicyConfig, pictures: int):
        self.device = pick_device("auto")
        self.dtype = autocast_type(pick_precision("auto", self.device, "precision", "training"))
        self.model = AlignmentTrainee(model).to(self.device).train()
        self.prior = copy.deepcopy(model).requires_grad_(False).to(self.device)
        self.objective = TeacherForcedPolicy(
            config, tokenizer, self.prior, total_steps=100, seed=0, world=World(0, 1, self.device),
            autocast_dtype=self.dtype,
        )  # fmt: skip
        side = tokenizer.image_size
        images = torch.rand(pictures, 3, side, side, generator=seeded(0, "images")) * 2 - 1
        self.batch = ImageBatch(images.to(self.device), (torch.arange(pictures) % 10).to(self.device))
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-6, min_lr=1e-6))
        self.seconds: dict[str, float] = {}
        for name, owner, key in (
            ("decoder", self.objective, "decode"), ("reward", self.objective.rewards, "measure")
        ):  # fmt: skip
            setattr(owner, key, self.timed(name, getattr(owner, key)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            start = self.now()
            result = function(*args, **settings)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
            return result

        return call

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def ours(self) -> None:
        """Gradients by the library's objective: one pass per image."""
        prepared = self.objective.prepare(self.model, self.batch, 0)
        with self.autocast():
            loss, _ = self.objective.loss(self.model, prepared, 0)
        torch.autograd.backward(loss)

    def released(self) -> None:
        """Gradients by one pass per sample."""
        rollout = self.objective.prepare(self.model, self.batch, 0)
        with torch.no_grad(), self.autocast():
            logits = self.model(rollout.context, rollout.condition).logits
        drawn = self.objective.reward(self.model, self.objective.look(logits, rollout).drawn, rollout.batch)
        old = policy.token_log_probs(logits, drawn.actions).flatten(0, 1)
        actions, advantages = drawn.actions.flatten(0, 1), drawn.advantages.flatten(0, 1)
        rows = torch.arange(len(logits), device=self.device).repeat_interleave(drawn.actions.shape[1])
        for part in torch.arange(len(rows), device=self.device).split(MICRO_BATCH):
            loss = self.sample_loss(rollout, rows[part], actions[part], old[part], advantages[part])
            torch.autograd.backward(loss * len(part) / len(rows))

    def sample_loss(
        self, rollout: PolicyForced, rows: Tensor, actions: Tensor, old: Tensor, advantages: Tensor
    ) -> Tensor:
        assert isinstance(rollout.condition, Tensor)
        context, condition = rollout.context[rows], rollout.condition[rows]
        with self.autocast():
            logits = self.model(context, condition).logits
            with torch.no_grad():
                prior, _ = self.prior(context, condition)
        log_probs = policy.token_log_probs(logits, actions[:, None])[:, 0]
        policy.kl_k3(log_probs.detach(), policy.token_log_probs(prior, actions[:, None])[:, 0])  # and not used
        ratio = policy.probability_ratio(log_probs, old)
        clip = self.objective.config.clip_range
        loss = policy.clipped_policy_loss(ratio, advantages, clip, clip).mean()
        return loss + self.objective.config.ce_weight * losses.next_token_loss(logits, rollout.batch.tokens[rows])

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, way: Callable[[], None]) -> Tensor:
        way()
        flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return flat

    def split(self, way: Callable[[], None], rounds: int) -> dict[str, float]:
        """Median seconds of a whole step and of its parts; `generator` is all that is in no other part."""
        records = []
        for _ in range(rounds + 1):
            self.seconds.clear()
            start = self.now()
            way()
            middle = self.now()
            self.update()
            whole = self.now() - start
            parts = {**self.seconds, "update": self.now() - middle}
            records.append({"step": whole, "generator": whole - sum(parts.values()), **parts})
        kept = records[1:]  # the first is a warm-up
        return {key: sorted(record[key] for record in kept)[len(kept) // 2] for key in kept[0]}


def bench_of(args: argparse.Namespace, group_size: int) -> Bench:
    shape = LlamaGenConfig(width=args.width, num_layers=args.layers, num_heads=args.width // 64)
    tokenizer = load_tokenizer("openmoji-64").to(pick_device("auto"))
    model = LlamaGenGenerator(shape.sized(tokenizer.vocab_size, tokenizer.num_tokens, 10, tokenizer.grid))
    model.reset_parameters(seeded(0, "benchmark"))
    with torch.no_grad():  # the published initialisation has a zero output layer: every draw would be uniform
        model.output.weight.normal_(std=0.02, generator=seeded(0, "benchmark_output"))
    return Bench(model, tokenizer, PolicyConfig(rewards=REWARDS, group_size=group_size), args.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    bench = bench_of(args, 8)
    dtype, bench.dtype = bench.dtype, None  # rounding to bf16 would draw other tokens
    ours, released = bench.gradient(bench.ours), bench.gradient(bench.released)
    bench.dtype = dtype
    cosine = float(torch.nn.functional.cosine_similarity(ours.double(), released.double(), dim=0))
    if cosine < 0.999:
        raise SystemExit(f"the two ways disagree: cosine of their gradients {cosine:.4f}")

    def step(way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            way()
            bench.update()

        return run

    seconds = interleaved({"shared context": step(bench.ours), "released": step(bench.released)}, args.rounds)
    splits = {
        "shared context": bench.split(bench.ours, args.rounds),
        "released": bench.split(bench.released, args.rounds),
    }
    figures = {
        "whole step, released / shared context, G = 8": round(ratio(seconds, "released", "shared context"), 2),
        "generator part, released / shared context, G = 8": round(
            splits["released"]["generator"] / splits["shared context"]["generator"], 2
        ),
        "cosine of the gradients, float32": round(cosine, 6),
        "split, G = 8, seconds": splits,
        "split of the shared context by G, seconds": {str(group): split_of(args, group) for group in args.group_sizes},
        "seconds": seconds,
    }
    config = {"width": args.width, "layers": args.layers, "batch_size": args.batch_size, "micro_batch": MICRO_BATCH}
    write_result("vapi", config, 0, figures)


def split_of(args: argparse.Namespace, group: int) -> dict[str, float]:
    bench = bench_of(args, group)
    return bench.split(bench.ours, args.rounds)


if __name__ == "__main__":
    main()
