"""Sampling: tokens one by one with a cache, classifier-free guidance, then one decode.

Every image has a seed of its own and draws one uniform number per token by inverse transform, so that a sample depends
on its seed, condition and settings, and on the batch it is drawn in by rounding alone (docs/sampling.md); two models
sampled with equal seeds see equal numbers (common random numbers). Guidance, temperature, top-k and top-p apply in this
order, as in LlamaGen's sampler.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from consonar import records
from consonar.distributed import beside
from consonar.errors import UserError
from consonar.options import LARGEST, SMALLEST, CountOrZero, NotNegative, Options, Positive, Range, ReadOnlyWith
from consonar.origin import check, of_tokenizer
from consonar.precision import multiplying, pick_precision, with_weights
from consonar.records import Fetched, device_of, one_ahead, to_device
from consonar.sampling.checks import check_batch_size, check_condition, class_ids
from consonar.sampling.decoder import Decoder
from consonar.sampling.pictures import PictureDecoder, evaluating
from consonar.seeding import check_seed, choose, uniform
from consonar.seeding import generator as seeded
from consonar.types import Condition, Generator, PromptCondition, TextCondition, Tokenizer

GuidanceSchedule = Literal["constant", "linear", "power_cosine", "power_cosine_vapi", "interval"]
GREEDY = "0 takes the most likely token"
DRAWN = ReadOnlyWith(lambda given: given.temperature > 0, "{}temperature over 0")
GUIDED = ReadOnlyWith(lambda given: given.guidance_scale != 1, "{}guidance_scale other than 1")
POWER = ReadOnlyWith(
    lambda given: given.guidance_schedule.startswith("power_cosine"),
    "{}guidance_schedule 'power_cosine' or 'power_cosine_vapi'",
)
NO_INTERVAL = "leave it away to guide all positions, which is LlamaGen's cfg_interval -1"
INTERVAL = ReadOnlyWith(lambda given: given.guidance_schedule == "interval", "{}guidance_schedule 'interval'")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Options):
    """How tokens are drawn."""

    temperature: Annotated[float, Range(SMALLEST, LARGEST, or_zero=True, note=GREEDY)] = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: Annotated[CountOrZero, DRAWN] = 0
    """Only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Range(0, 1, "(]"), DRAWN] = 1.0
    """Only the most likely tokens that together reach this probability; 1: all."""
    guidance_scale: NotNegative = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_schedule: Annotated[GuidanceSchedule, GUIDED] = "constant"
    """How guidance moves over positions."""
    guidance_power: Annotated[Positive, POWER] = 1.0
    """Exponent of power_cosine and power_cosine_vapi."""
    guidance_interval: Annotated[int | None, Range(0, note=NO_INTERVAL), INTERVAL] = None
    """Last guided position of interval, from 0; None: all. LlamaGen's cfg_interval is this less 1."""

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
    precision: str = "fp32"
    """What they were drawn and decoded in."""


def power_cosine_scale(scale: float, power: float, position: int, num_tokens: int) -> float:
    """1 + (scale - 1) (1 - cos(pi (i / N)^power)) / 2 (MDT, used by RAR and reAR): 1 at the first token, `scale` only
    at i = N, which no token has."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (position / num_tokens) ** power)) / 2


def scale_at(
    schedule: GuidanceSchedule,
    scale: float,
    position: int,
    num_tokens: int,
    *,
    power: float = 1.0,
    interval_end: int | None = None,
) -> float:
    """Guidance scale for the token at `position` (0-based) of `num_tokens`.

    constant: `scale`. linear: from 1 at the first token to `scale` at the last. power_cosine: see above.
    power_cosine_vapi: `scale` at the first token, then power_cosine over the others, so 1 at the second: VA-pi's
    sampler does not count the token that the prefill predicts. interval: `scale` up to and including position
    `interval_end` (None: always), 1 after it; LlamaGen's cfg_interval k, which does not count that token either, is
    `interval_end` k + 1, and its -1 is None.
    """
    if schedule == "constant":
        return scale
    if schedule == "linear":
        return 1 + (scale - 1) * position / max(1, num_tokens - 1)
    if schedule == "power_cosine":
        return power_cosine_scale(scale, power, position, num_tokens)
    if schedule == "power_cosine_vapi":
        return scale if position == 0 else power_cosine_scale(scale, power, position - 1, num_tokens - 1)
    assert schedule == "interval", schedule
    return scale if interval_end is None or position <= interval_end else 1.0


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf outside the k most likely tokens, then outside the smallest set that reaches `top_p`: (B, V) -> (B, V).

    Released samplers keep one token more where the set's probability is `top_p` to the last bit.
    """
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all more likely tokens
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """One number per image and token, (B, N) in [0, 1), row b from `seeds[b]` alone: an integer of any type."""
    return torch.stack([uniform(seeded(n, "sample"), num_tokens, dtype=torch.float64) for n in plain_seeds(seeds)])


def plain_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds, which may be of any integer type; `UserError` for what is none, or not from 0 to 2^63 - 1."""
    try:
        plain = [operator.index(seed) for seed in seeds]  # NumPy's 3 and a tensor's 3 are the seed 3
    except TypeError as error:
        raise UserError(f"seeds: {error}; give one integer for each image") from error
    for seed in plain:
        check_seed(seed, "seeds")
    return plain


def draw_tokens(logits: Tensor, draws: Tensor, config: SamplerConfig) -> tuple[Tensor, Tensor]:
    """Tokens (B,) of guided logits (B, V) by numbers (B, 1) in [0, 1), and the entropy (B,) of their distribution."""
    if config.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logits = filter_logits(logits / config.temperature, config.top_k, config.top_p)
    return choose(logits, draws)[:, 0], torch.special.entr(logits.softmax(-1)).sum(-1)


def decoder_of(
    generator: Generator, config: SamplerConfig, *, num_tokens: int | None = None, graphs: bool = True
) -> Decoder:
    """What draws batches with these settings; `num_tokens` as in `sample_tokens`, `graphs` as in `Decoder`."""
    length = generator.num_tokens if num_tokens is None else num_tokens
    if not 1 <= length <= generator.num_tokens:
        raise UserError(f"num_tokens: {num_tokens} is not between 1 and the generator's {generator.num_tokens}")
    scales = [config.scale(i, length) for i in range(length)]
    return Decoder(generator, scales, partial(draw_tokens, config=config), graphs=graphs)


def sample_tokens(
    generator: Generator,
    condition: Condition,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) and the mean entropy (B,) of the filtered distributions, for B conditions and one seed per row.

    Conditional and null rows run as one batch of 2B while guidance is on at any position. `num_tokens`: only the first
    ones, which are also all that the guidance schedule knows of. Raises `UserError` for logits that are not finite.
    """
    return draw_batch(decoder_of(generator, config, num_tokens=num_tokens), condition, seeds)


def draw_batch(decoder: Decoder, condition: Condition, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As `sample_tokens`, by a decoder that may keep its graphs."""
    if len(seeds) != (count := records.num_rows(condition)):
        raise UserError(f"seeds: {len(seeds)} seeds for {count} conditions")
    return decoder(condition, uniforms(seeds, len(decoder.scales)))


@torch.inference_mode()
def sample(
    generator: Generator,
    tokenizer: Tokenizer,
    condition: Condition | Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    config: SamplerConfig | None = None,
    batch_size: int = 64,
    precision: str = "auto",
) -> Samples:
    """Images for conditions (class ids (B,) int64, or captions), row b from `seeds[b]`.

    Drawn in batches of `batch_size` on the generator's device, which the tokenizer shares; returned on the CPU.
    `precision`: one of `precision.CHOICES`; models of other weights are copied. Raises `UserError` for conditions that
    the generator does not have, a tokenizer that does not fit it or that it was not trained with, or a batch size below
    1. Models are in evaluation mode inside.
    """
    if not isinstance(condition, TextCondition | PromptCondition):
        condition = class_ids(condition)
    count = records.num_rows(condition)
    seeds = plain_seeds(range(count) if seeds is None else seeds)
    check_batch_size(batch_size)
    config = SamplerConfig() if config is None else config
    if not isinstance(config, SamplerConfig):
        raise UserError(f"config: a {type(config).__name__}; give a SamplerConfig")
    check_fit(generator, tokenizer, config)
    if (origin := getattr(generator, "origin", None)) is not None:  # of a generator that was loaded
        used, remedy = of_tokenizer(tokenizer), "its codes mean something else; see `load_own_tokenizer`"
        check("tokenizer", used, origin, "the generator", remedy)
    check_condition(condition, generator)
    if not 0 < count == len(seeds):
        raise UserError(f"seeds: {len(seeds)} seeds for {count} conditions; give one each, and at least one")
    device = device_of(generator)
    chosen = pick_precision(precision, device, "precision", "sampling")
    models = with_weights(generator, chosen, device), with_weights(tokenizer, chosen, device)
    return draw(decoder_of(models[0], config), PictureDecoder(models[1]), condition, seeds, batch_size, chosen)


@torch.inference_mode()
def draw(
    decoder: Decoder, pictures: PictureDecoder, condition: Condition, seeds: Sequence[int], batch_size: int,
    precision: str, beat: Callable[[], object] | None = None,
) -> Samples:  # fmt: skip
    """`sample` of what was checked, by models with the weights of the precision; `beat` is called for every batch."""
    device = device_of(decoder.generator)

    def batches() -> Iterator[Fetched[Samples]]:
        for start in range(0, len(seeds), batch_size):
            rows = to_device(records.rows(condition, slice(start, start + batch_size)), device)
            tokens, entropy = draw_batch(decoder, rows, seeds[start : start + batch_size])
            with beside(device, tokens, entropy):
                drawn = Fetched(Samples(pictures(tokens), tokens, entropy, precision))
            if beat:
                beat()
            yield drawn

    with multiplying(precision, device), evaluating(decoder.generator, pictures.tokenizer):
        return records.concatenate(*one_ahead(batches()))


def check_fit(generator: Generator, tokenizer: Tokenizer, config: SamplerConfig) -> None:
    """Raises `UserError` where one is no model, the tokenizer does not fit, or guidance would end behind the tokens."""
    for what, model, part in (("generator", generator, "num_classes"), ("tokenizer", tokenizer, "decode")):
        if not hasattr(model, part):
            raise UserError(f"{what}: a {type(model).__name__} is none; load one with `load_{what}`")
    for key in ("vocab_size", "num_tokens"):
        ours, theirs = getattr(generator, key), getattr(tokenizer, key)
        if ours != theirs:
            raise UserError(f"tokenizer: {tokenizer.name} has {key} {theirs}, the generator was trained with {ours}")
    if (end := config.guidance_interval or 0) >= generator.num_tokens:
        raise UserError(f"guidance_interval: {end} is not in [0, {generator.num_tokens - 1}]; {NO_INTERVAL}")
