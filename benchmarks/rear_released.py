"""A training step of reAR against the released arithmetic: the same weights, batch, loss and precision.

The alternative does what the released code does: AdaLN of every image with a SiLU in every block, PyTorch's fused
attention, dropout and AdamW as they are by default, cross-entropy of a float32 copy of the logits. With few classes
(those of the demo) AdaLN is projected per class here; with ImageNet's 1,000 it is per image too, so that what is left
is kernels and passes over memory. Run: python benchmarks/rear_released.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from common import interleaved, optimiser_step, ratio, write_result
from torch import Tensor
from torch.nn import functional as F

from consonar.components import load_tokenizer
from consonar.cpu import timing
from consonar.distributed import pick_device
from consonar.generators.rear import REAR_PRESETS, ReARGenerator
from consonar.precision import autocast_type, pick_precision
from consonar.seeding import generator as seeded
from consonar.training import losses
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.optim import OptimConfig, build_optimizer, parameter_groups
from consonar.training.trainee import Trainee
from consonar.types import TokenBatch


class Released(ReARGenerator):
    """Without a cache."""

    def hidden_states(self, context, condition, *, cache=None, tap_layers=()):
        of_class = self.embeddings(condition + self.vocab_size + 1)[:, None]
        x = torch.cat([self.cls_token.expand(len(context), -1, -1), of_class, self.embeddings(context)], 1)
        length = x.shape[1]
        target = F.pad(self.target_aware_pos_embed[:, 2:length], (0, 0, 1, 1))
        x, step = x + self.pos_embed[:, :length] + target, of_class + self.timesteps_embeddings[:, :length]
        taps = {}
        for layer, block in enumerate(self.blocks):
            x = self.one_block(block, x, step)
            if layer in tap_layers:
                taps[layer] = x
        head = self.adaln_before_head
        scale, shift = head.adaLN_modulation(F.silu(step)).chunk(2, -1)
        return head.norm_final(x) * (1 + scale) + shift, taps

    @staticmethod
    def one_block(block, x, step):
        parts = block.adaLN_modulation(F.silu(step)).chunk(6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        mixed = block.attn(block.norm1(x) * (1 + scale_a) + shift_a, None, None, 0)
        x = x + gate_a * block.dropout(mixed)
        return x + gate_m * block.dropout(block.mlp(block.norm2(x) * (1 + scale_m) + shift_m))


@contextmanager
def pytorchs_own() -> Iterator[None]:
    """No kernel of ours, and cross-entropy of a float32 copy."""
    ours = losses.next_token_loss
    with ExitStack() as stack:
        for family in ("attention", "dropout", "adamw"):
            stack.enter_context(timing.forced(family, False))
        losses.next_token_loss = lambda logits, tokens: F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        try:
            yield
        finally:
            losses.next_token_loss = ours


def make_step(args: argparse.Namespace, classes: int, released: bool) -> tuple[Callable[[], None], Callable[[], float]]:
    """A whole optimiser step, and the loss of the weights as they were made, without dropout and in float32."""
    device, tokenizer = pick_device("auto"), load_tokenizer("openmoji-64")
    shape = REAR_PRESETS[args.preset].sized(tokenizer.vocab_size, tokenizer.num_tokens, classes)
    shape = replace(shape, num_layers=args.layers or shape.num_layers, dropout=0.1)
    config = AutoregressiveConfig(
        embedding_weight=1.0, head_width=256 if args.preset == "tiny" else 2048,
        noise=NoiseConfig(schedule="truncated_linear"),
    )  # fmt: skip
    model = Trainee(
        (Released if released else ReARGenerator)(shape), config.head_specs(shape.num_layers, tokenizer.code_dim)
    )
    rng = seeded(0, "benchmark")
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, which would hide a difference
            parameter.normal_(std=0.02, generator=rng)
    model.to(device).train()
    objective = Autoregressive(config, tokenizer.to(device), total_steps=1000, seed=0)
    groups = parameter_groups(model, OptimConfig().weight_decay)
    optimizer = torch.optim.AdamW(groups) if released else build_optimizer(model, OptimConfig())
    tokens = torch.randint(tokenizer.vocab_size, (args.batch_size, tokenizer.num_tokens), generator=seeded(0, "tokens"))
    batch = TokenBatch(tokens.to(device), torch.arange(args.batch_size, device=device) * 7 % classes)
    dtype = autocast_type(pick_precision("auto", device, "precision", "training"))

    step = optimiser_step(model, objective, optimizer, batch, dtype)

    def loss_of_start() -> float:
        model.eval()
        with torch.no_grad():
            loss: Tensor = objective.loss(model, objective.prepare(model, batch, 1), 1)[0]
        model.train()
        return float(loss)

    return step, loss_of_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(REAR_PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="0: the preset's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    steps: dict[str, Callable[[], None]] = {}
    for classes in (1000, 10):
        (ours, our_loss), (step, loss) = (make_step(args, classes, released) for released in (False, True))
        assert abs(our_loss() - loss()) < 1e-4 * loss(), "the two calculate the same"

        def theirs(step: Callable[[], None] = step) -> None:
            with pytorchs_own():
                step()

        steps |= {f"ours, {classes} classes": ours, f"released, {classes} classes": theirs}
    busy = os.getloadavg()[0]
    seconds = interleaved(steps, args.rounds)
    figures = {
        f"released / ours, {classes} classes": round(
            ratio(seconds, f"released, {classes} classes", f"ours, {classes} classes"), 2
        )
        for classes in (1000, 10)
    }
    figures |= {"chosen on this machine": timing.kept_answers(), "load average before": busy, "seconds": seconds}
    config = {"preset": args.preset, "layers": args.layers, "batch_size": args.batch_size}
    write_result(f"rear_released_{args.preset}", config, 0, figures)


if __name__ == "__main__":
    main()
