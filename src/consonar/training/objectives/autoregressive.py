"""Next-token prediction on tokens: plain AR (the defaults) and reAR.

reAR (arXiv 2510.04450): L = L_ar + lambda L_emb, with L_ar on a noisy context and clean targets, and L_emb =
mean(1 - cos) of two heads: one at a shallow layer regresses the code of the token being read, one at a deep layer that
of the token being predicted. Plain AR is the same objective with weight 0 and noise 0, bit for bit on one machine.

Deviations from the released code: the loss is 1 - cos instead of -cos (a constant apart); noise is drawn in `prepare`,
never inside the model; noised positions keep their encode term by default, as in the article (`mask_noised=True` is the
released behaviour).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from consonar.distributed import ALONE, World
from consonar.errors import UserError
from consonar.options import Count, CountOrZero, NotNegative, ReadOnlyWith, ShareBelowOne
from consonar.seeding import generator
from consonar.training import losses, noise
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.base import ObjectiveConfig, alignment_terms, codebook_of, drop_classes, means
from consonar.training.trainee import HeadSpec, Trainee
from consonar.types import Condition, Objective, TokenBatch, Tokenizer

HEADS = ReadOnlyWith(lambda given: given.embedding_weight > 0, "{}embedding_weight over 0")
ENCODE_HEAD = ReadOnlyWith(
    lambda given: given.has_head("encode"), "{}embedding_weight over 0 and {}heads 'encode' or 'both'"
)
DECODE_HEAD = ReadOnlyWith(
    lambda given: given.has_head("decode"), "{}embedding_weight over 0 and {}heads 'decode' or 'both'"
)
NOISED_ENCODE_HEAD = ReadOnlyWith(
    lambda given: given.has_head("encode") and given.noise.replaces,
    "{}embedding_weight over 0, {}heads 'encode' or 'both', {}noise.schedule but 'none' and {}noise.max_rate over 0",
)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(ObjectiveConfig):
    """Plain AR (the defaults) and reAR."""

    kind: Literal["consistency"] = "consistency"
    embedding_weight: NotNegative = 0.0
    """lambda, the weight of codebook embedding regularisation."""
    heads: Annotated[Literal["encode", "decode", "both"], HEADS] = "both"
    """Which alignment heads exist; none does while `embedding_weight` is 0."""
    encode_layer: Annotated[CountOrZero, ENCODE_HEAD] = 0
    """0-based layer at which the code of the token being read is regressed."""
    decode_layer: Annotated[CountOrZero | None, DECODE_HEAD] = None
    """0-based layer at which the next token's code is regressed; None: three quarters of the depth."""
    head_depth: Annotated[Count, HEADS] = 3
    """Linear maps of a head (released weights 3, article 2)."""
    head_width: Annotated[Count, HEADS] = 2048
    """Hidden width of a head."""
    mask_noised: Annotated[bool, NOISED_ENCODE_HEAD] = False
    """Zero the encode term at noised positions, as the released code does."""
    class_dropout: ShareBelowOne = 0.1
    """Probability of training an image without its class, for classifier-free guidance."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Noisy context."""

    def has_head(self, side: Literal["encode", "decode"]) -> bool:
        """Whether a generator is trained with this alignment head."""
        return self.embedding_weight > 0 and self.heads in (side, "both")

    def head_specs(self, num_layers: int, code_dim: int) -> tuple[HeadSpec, ...]:
        """The heads of a generator with `num_layers` blocks for a tokenizer of width `code_dim`."""
        decode_layer = num_layers * 3 // 4 if self.decode_layer is None else self.decode_layer
        specs = []
        if self.has_head("encode"):
            specs.append(HeadSpec("current", self.encode_layer, "current", code_dim, self.head_depth, self.head_width))
        if self.has_head("decode"):
            specs.append(HeadSpec("next", decode_layer, "next", code_dim, self.head_depth, self.head_width))
        return tuple(specs)


@dataclass(frozen=True)
class NoisyTokens:
    """A batch of tokens, ready for the loss."""

    tokens: Tensor
    """(B, N) int64: the targets."""
    context: Tensor
    """(B, N) int64: the tokens fed, maybe corrupted."""
    condition: Condition
    """The condition fed, maybe dropped to the null condition."""
    corrupted: Tensor
    """(B, N) bool: where `context` was replaced."""


class Autoregressive(Objective[TokenBatch, NoisyTokens]):
    """`total_steps` is the length of the run (the noise schedule's clock)."""

    def __init__(
        self, config: AutoregressiveConfig, tokenizer: Tokenizer, *, total_steps: int, seed: int, world: World = ALONE
    ):
        self.config, self.tokenizer = config, tokenizer
        self.total_steps, self.seed, self.world = total_steps, seed, world
        self.neighbours: Tensor | None = None  # made when first needed, on the device of the tokens
        count = config.noise.num_neighbours
        if config.noise.corruption == "nearest" and count >= tokenizer.vocab_size:
            choices = f"choices: 1..{tokenizer.vocab_size - 1}, the other codes of {tokenizer.name}"
            raise UserError(f"objective.noise.num_neighbours: {count} is too many; {choices}")

    def noise_rate(self, step: int) -> float:
        """f(t) at this step."""
        settings = self.config.noise
        return noise.max_noise_rate(
            settings.schedule, step / self.total_steps, max_rate=settings.max_rate, anneal_end=settings.anneal_end
        )

    @torch.no_grad()
    def prepare(self, model: Trainee, batch: TokenBatch, step: int) -> NoisyTokens:
        """Drops classes and corrupts the context; each from a generator of its own, so that neither moves the other."""
        share = self.config.class_dropout
        condition = drop_classes(model.generator, batch.condition, share, self.seed, step, self.world)
        context, corrupted = self._corrupt(model, batch.tokens, step)
        return NoisyTokens(batch.tokens, context, condition, corrupted)

    def _corrupt(self, model: Trainee, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        rate = self.noise_rate(step)
        if rate == 0:
            return tokens, torch.zeros_like(tokens, dtype=torch.bool)
        rng = generator(self.seed, "noise", step, 0)
        settings, mask_token = self.config.noise, None
        if settings.corruption == "mask":
            mask_token = getattr(model.generator, "mask_token", None)
            if mask_token is None:
                raise UserError(
                    "objective.noise.corruption: 'mask' needs a generator with a mask token; choices: uniform, nearest"
                )
        if settings.corruption == "nearest" and self.neighbours is None:
            codebook = codebook_of(self.tokenizer, tokens.device)
            self.neighbours = noise.code_neighbours(codebook, settings.num_neighbours)
        rates = self.world.own_rows(lambda n: noise.draw_noise_rates(settings.schedule, rate, n, rng), len(tokens))
        vocab_size, world = self.tokenizer.vocab_size, self.world
        return noise.corrupt_tokens(
            tokens, rates, vocab_size, rng, world, mask_token=mask_token, neighbours=self.neighbours
        )

    def loss(self, model: Trainee, prepared: NoisyTokens, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on the clean targets, and with heads the weighted alignment of their codes."""
        prediction = model(prepared.context, prepared.condition)
        total = cross_entropy = losses.next_token_loss(prediction.logits, prepared.tokens)
        terms = {"cross_entropy": cross_entropy}
        keep = ~prepared.corrupted if self.config.mask_noised else None
        for name, term in alignment_terms(prediction.taps, self.tokenizer, prepared.tokens, keep).items():
            terms[name] = term
            total = total + self.config.embedding_weight * term
        return total, terms

    def state(self, step: int) -> dict[str, float]:
        return {"noise_rate": self.noise_rate(step)}

    @torch.no_grad()
    def validate(self, model: Trainee, batches: Iterator[TokenBatch]) -> dict[str, float]:
        """Teacher-forced cross-entropy (nats), accuracy and entropy on a clean context with the true class."""
        measured = []
        for batch in batches:
            logits = model(batch.tokens, batch.condition).logits
            values = {
                "cross_entropy": losses.next_token_loss(logits, batch.tokens),
                "accuracy": losses.next_token_accuracy(logits, batch.tokens),
                "entropy": losses.entropy(logits).mean(),
            }
            measured.append((len(logits), values))
        return means(measured)
