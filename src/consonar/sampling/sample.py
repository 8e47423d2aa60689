"""Sampling: tokens one by one with a cache, then one decode.

Every image has a seed of its own and draws one uniform number per token by inverse transform, so that a sample depends
on its seed, class and settings, not on the batch it is drawn in; two models sampled with equal seeds see equal numbers
(common random numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from consonar.errors import UserError
from consonar.sampling.guidance import guided_logits, scale_at
from consonar.seeding import generator as seeded
from consonar.types import Generator, Tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1: all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_schedule: Literal["constant", "linear", "power_cosine", "interval"] = "constant"
    """How guidance moves over positions."""
    guidance_power: float = 1.0
    """Exponent of power_cosine."""
    guidance_interval: int | None = None
    """Last guided position of interval; None: all."""

    def __post_init__(self) -> None:
        for key in ("temperature", "guidance_scale", "guidance_power"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key}: {getattr(self, key)} is negative or not finite")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.guidance_power == 0:
            raise UserError(f"guidance_power: {self.guidance_power} is not positive")

    def scale(self, position: int, num_tokens: int) -> float:
        return scale_at(
            self.guidance_schedule, self.guidance_scale, position, num_tokens,
            power=self.guidance_power, interval_end=self.guidance_interval,
        )  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """images (B, 3, H, W) in [-1, 1], tokens (B, N), and (B,) the mean entropy of what they were drawn from, nats."""

    images: Tensor
    tokens: Tensor
    entropy: Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf outside the k most likely tokens, then outside the smallest set that reaches `top_p`: (B, V) -> (B, V)."""
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all more likely tokens
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p), -torch.inf
        )
    return logits


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform draw: (B,) int64 <- logits (B, V), uniform (B,) in [0, 1). Float64: large V stays exact."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # `right`: a draw of exactly 0 must not fall on a token of probability 0.
    index = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return index.clamp_max(logits.shape[-1] - 1)


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """One number per image and token, (B, N) in [0, 1), row b from `seeds[b]` alone."""
    return torch.stack(
        [torch.rand(num_tokens, generator=seeded(seed, "sample"), dtype=torch.float64) for seed in seeds]
    )


@torch.inference_mode()
def sample_tokens(
    generator: Generator,
    condition: Tensor,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) and the mean entropy (B,) of the filtered distributions, for conditions (B,) and one seed per row.

    Conditional and null rows run as one batch of 2B while guidance is on at any position. `on_token(position, tokens)`
    is called after each token.
    """
    if len(seeds) != len(condition):
        raise UserError(f"seeds: {len(seeds)} seeds for {len(condition)} conditions")
    count, device = len(condition), condition.device
    scales = [config.scale(i, generator.num_tokens) for i in range(generator.num_tokens)]
    guided = any(scale != 1 for scale in scales)
    rows = torch.cat([condition, generator.null_condition(condition)]) if guided else condition
    cache = generator.new_cache(len(rows))
    draws = uniforms(seeds, generator.num_tokens).to(device)
    tokens = torch.empty(count, generator.num_tokens, dtype=torch.int64, device=device)
    entropy = torch.zeros(count, device=device)
    new = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    for position in range(generator.num_tokens):
        logits, _ = generator(new, rows, cache=cache)
        logits = logits[:, -1].float()
        if guided:
            logits = guided_logits(logits[:count], logits[count:], scales[position])
        if config.temperature == 0:
            token = logits.argmax(-1)
        else:
            logits = filter_logits(logits / config.temperature, config.top_k, config.top_p)
            token = choose(logits, draws[:, position])
            entropy += torch.special.entr(logits.softmax(-1)).sum(-1) / generator.num_tokens
        tokens[:, position] = token
        if on_token:
            on_token(position, tokens)
        new = (torch.cat([token, token]) if guided else token)[:, None]
    return tokens, entropy


@torch.inference_mode()
def sample(
    generator: Generator,
    tokenizer: Tokenizer,
    condition: Tensor | Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    config: SamplerConfig | None = None,
    batch_size: int = 64,
) -> Samples:
    """Images for class ids `condition` (B,) int64, row b from `seeds[b]`.

    Drawn in batches of `batch_size` on the generator's device, which the tokenizer shares; returned on the CPU.
    Raises `UserError` for a class that the generator does not have, a tokenizer that does not fit it, or a batch size
    below 1.
    """
    condition = torch.as_tensor(condition, dtype=torch.int64)
    seeds = range(len(condition)) if seeds is None else seeds
    check_batch_size(batch_size)
    check_fit(generator, tokenizer)
    check_classes(condition, generator)
    if not 0 < len(condition) == len(seeds):
        raise UserError(f"seeds: {len(seeds)} seeds for {len(condition)} conditions; give one each, and at least one")
    device = next(cast(nn.Module, generator).parameters()).device
    parts = []
    for start in range(0, len(condition), batch_size):
        rows = condition[start : start + batch_size].to(device)
        tokens, entropy = sample_tokens(generator, rows, seeds[start : start + batch_size], config or SamplerConfig())
        images = tokenizer.decode(tokens).clamp(-1, 1)
        parts.append((images.float().cpu(), tokens.cpu(), entropy.cpu()))
    images, tokens, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return Samples(images, tokens, entropy)


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not a number of images, 1 or more")


def check_fit(generator: Generator, tokenizer: Tokenizer) -> None:
    """Raises `UserError` when the tokenizer cannot decode what the generator predicts."""
    for key in ("vocab_size", "num_tokens"):
        ours, theirs = getattr(generator, key), getattr(tokenizer, key)
        if ours != theirs:
            raise UserError(f"tokenizer: {tokenizer.name} has {key} {theirs}, the generator was trained with {ours}")


def check_classes(condition: Tensor, generator: Generator) -> None:
    wrong = condition[(condition < 0) | (condition >= generator.num_classes)]
    if len(wrong):
        last = generator.num_classes - 1
        raise UserError(f"classes: {int(wrong[0])} is not a class of this generator; choices: 0..{last}")
