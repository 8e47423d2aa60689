"""The controls of VA-pi (arXiv 2512.19680) in the same loop: same images, context noise, steps and measurements.

- `ce`: cross-entropy on the true tokens alone, the prior term of VA-pi without its policy term.
- `soft`: cross-entropy against softmax over codes k of -|Z[k] - Z[x_i]|^2 / tau: what the pixel reward would teach if
  the decoder were linear and local; needs neither decoder nor reward.
- `ste`: Gumbel-softmax (Jang et al. 2017) straight through the codebook; pixel and perceptual loss through the frozen
  decoder, plus the same cross-entropy prior.

Letters: `B` images, `N` tokens, `V` codes, `C` code width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.errors import UserError
from consonar.float32 import exact
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.options import Divisor, NotNegative, ReadOnlyWith
from consonar.seeding import derive_seed, exponential, generator_of
from consonar.training import losses
from consonar.training import policy_gradient as policy
from consonar.training.objectives.alignment import Alignment, AlignmentConfig, AlignmentTrainee, Forced
from consonar.training.objectives.base import codebook_of
from consonar.types import ImageBatch

SOFT = ReadOnlyWith(lambda given: given.target == "soft", "{}target 'soft'")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig(AlignmentConfig):
    """Teacher-forced fine-tuning: the control that every claim is measured against."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    target: Literal["one_hot", "soft"] = "one_hot"
    """The true token, or all codes by their distance to its code."""
    tau: Annotated[Divisor, SOFT] = 0.1
    """Temperature of soft targets, in squared distance of codes."""


class CrossEntropy(Alignment):
    config: CrossEntropyConfig

    def __init__(self, config: CrossEntropyConfig, *args: Any, **settings: Any):
        super().__init__(config, *args, **settings)
        self.targets: Tensor | None = None
        if config.target == "soft":
            codes = codebook_of(self.tokenizer, self.world.device).detach().float()
            self.targets = policy.code_similarity_targets(codes, config.tau)

    def loss(self, model: AlignmentTrainee, prepared: Forced, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on the true tokens, or against the soft targets."""
        tokens = prepared.batch.tokens
        logits = model(prepared.context, prepared.condition).logits
        terms = {"cross_entropy": losses.next_token_loss(logits, tokens)}
        total = terms["cross_entropy"]
        if self.targets is not None:
            total = terms["soft_cross_entropy"] = losses.soft_cross_entropy(logits, self.targets[tokens])
        terms["entropy"] = losses.entropy(logits.detach()).mean()
        return total, terms


PIXELS = ReadOnlyWith(
    lambda given: given.mse_weight > 0 or given.perceptual_weight > 0, "{}mse_weight or {}perceptual_weight over 0"
)
FEATURES = ReadOnlyWith(lambda given: given.perceptual_weight > 0, "{}perceptual_weight over 0")


@dataclass(frozen=True, kw_only=True)
class StraightThroughConfig(AlignmentConfig):
    """The pixel loss differentiated through the decoder."""

    kind: Literal["straight_through"] = "straight_through"
    gumbel_temperature: Annotated[Divisor, PIXELS] = 1.0
    """Of the softmax whose gradient stands in for that of the choice."""
    mse_weight: NotNegative = 1.0
    """Mean squared error of pixels in [-1, 1]."""
    perceptual_weight: NotNegative = 1.0
    """Distance of network features, by `perceptual`."""
    perceptual: Annotated[Literal["lpips", "efficientnet-lite0"], FEATURES] = "lpips"
    """Which feature distance."""
    ce_weight: NotNegative = 0.1
    """beta_ce, cross-entropy on the true tokens."""

    @property
    def measures_lpips(self) -> bool:
        return super().measures_lpips or (self.perceptual == "lpips" and self.perceptual_weight > 0)


@dataclass(frozen=True)
class SeededForced(Forced):
    """With what the Gumbel noise is drawn from."""

    seeds: Tensor
    """(B,) int64."""


class StraightThrough(Alignment):
    config: StraightThroughConfig

    def __init__(self, config: StraightThroughConfig, *args: Any, **settings: Any):
        super().__init__(config, *args, **settings)
        self.codes = codebook_of(self.tokenizer, self.world.device).detach().float()
        self.perceptual: nn.Module | None = None
        if config.perceptual_weight > 0:
            smallest, side = PERCEPTUAL_DISTANCES[config.perceptual].smallest_input, self.tokenizer.image_size
            if side < smallest:
                raise UserError(
                    f"objective.perceptual_weight: {config.perceptual} reads images of {smallest} px or more, those of "
                    f"{self.tokenizer.name} have {side}; set it to 0"
                )
            self.perceptual = PERCEPTUAL_DISTANCES[config.perceptual].load(config.lpips_weights).to(self.world.device)

    @torch.no_grad()
    def prepare(self, model: AlignmentTrainee, batch: ImageBatch, step: int) -> SeededForced:
        """Context, and one seed per image for its Gumbel noise, so that micro-batches draw what the whole would."""
        first = derive_seed(self.seed, "gumbel", step, 0) % 2**62
        seeds = self.world.own_rows(lambda n: torch.arange(first, first + n), len(batch.images))
        return SeededForced(**vars(super().prepare(model, batch, step)), seeds=seeds)

    def loss(self, model: AlignmentTrainee, prepared: SeededForced, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel and perceptual loss through the frozen decoder, and cross-entropy on the true tokens."""
        images, tokens = prepared.batch.images, prepared.batch.tokens
        logits = model(prepared.context, prepared.condition).logits
        with exact(logits.device):
            noisy = logits.float() + gumbel_noise(prepared.seeds, logits)
            chosen = straight_through(noisy, self.config.gumbel_temperature)  # (B, N, V)
            decoded = self.tokenizer.decode_embeddings(chosen @ self.codes)
            if torch.is_grad_enabled() and not decoded.requires_grad:
                raise UserError("objective: the pixel loss has no gradient: decode_embeddings of the tokenizer cuts it")
            terms = {
                "mse": F.mse_loss(decoded, images),
                "cross_entropy": losses.next_token_loss(logits, tokens),
            }
            total = self.config.mse_weight * terms["mse"] + self.config.ce_weight * terms["cross_entropy"]
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(decoded, images).mean()
                total = total + self.config.perceptual_weight * terms["perceptual"]
        terms["entropy"] = losses.entropy(logits.detach()).mean()
        return total, terms


def gumbel_noise(seeds: Tensor, like: Tensor) -> Tensor:
    """Standard Gumbel numbers of the shape (B, N, V) of `like`, row b from seeds[b] alone, drawn on its device."""
    noise = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.copy_(exponential(generator_of(seed, like.device), *row.shape))
    return noise.log_().neg_()


def straight_through(logits: Tensor, temperature: float) -> Tensor:
    """The one-hot of the largest logit, (B, N, V), with the gradient of softmax(logits / temperature)."""
    soft = (logits / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard - soft.detach() + soft
