"""AR-GRPO (arXiv 2508.06924): policy gradient on sequences drawn freely, token by token, and rewarded from outside.

Everything but the draws is that of VA-pi (`policy.py`): G sequences of each condition, group-relative advantages, the
clipped loss, KL to the start model. The sequences are contexts of their own: an update passes over all B * G of them.

Letters: `B` conditions, `G` samples of each, `N` tokens, `V` codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consonar import records
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import derive_seed
from consonar.training import policy_gradient as policy
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.policy import Drawn, PolicyGradient
from consonar.types import Condition, EncodedBatch, ImageBatch


@dataclass(frozen=True)
class FreeRollout:
    """Sequences that were drawn freely."""

    batch: EncodedBatch
    condition: Condition
    """Of the B rows, maybe dropped to the null condition."""
    drawn: Drawn


class FreePolicy(PolicyGradient):
    """Follows `consonar.types.Objective`."""

    @torch.no_grad()
    def prepare(self, model: AlignmentTrainee, batch: ImageBatch, step: int) -> FreeRollout:
        """G free-running sequences of each condition, with guidance if so configured, and their advantages."""
        forced = self.force(model, batch, step)
        group, count = self.config.group_size, len(forced.batch.tokens)
        repeated = records.repeat(forced.condition, group)
        first = derive_seed(self.seed, "free", step, 0)
        places = self.own_rows(lambda n: torch.arange(n * group).view(n, group), count).flatten().tolist()
        sampler = SamplerConfig(temperature=self.config.temperature, guidance_scale=self.config.guidance_scale)
        with self.autocast():
            tokens, _ = sample_tokens(model.generator, repeated, [first + place for place in places], sampler)
        actions = tokens.clone().view(count, group, -1)  # a clone: made in inference mode, it could not be trained on
        drawn = self.reward(model, actions, forced.batch)
        if self.config.updates > 1:
            with self.autocast():
                logits = model(actions.flatten(0, 1), repeated).logits
            drawn = replace(drawn, old_log_probs=self.log_probs(logits, actions))
        return FreeRollout(forced.batch, forced.condition, drawn)

    def log_probs(self, logits: Tensor, actions: Tensor) -> Tensor:
        """(B, G, N) <- logits (B * G, N, V), each row's own."""
        flat = policy.token_log_probs(logits, actions.flatten(0, 1)[:, None], self.config.temperature)
        return flat.view(actions.shape)

    def loss(self, model: AlignmentTrainee, prepared: FreeRollout, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss on the drawn sequences, with KL to the start model."""
        drawn = prepared.drawn
        context = drawn.actions.flatten(0, 1)
        condition = records.repeat(prepared.condition, drawn.actions.shape[1])
        logits = model(context, condition).logits
        log_probs = self.log_probs(logits, drawn.actions)
        terms = self.policy_terms(log_probs, logits, drawn)
        total = terms["policy"]
        if self.config.kl_weight > 0:
            prior = self.prior_logits(context, condition)
            terms["kl"] = self.divergence(logits, log_probs, prior, drawn.actions)
            total = total + self.config.kl_weight * terms["kl"]
        return total, terms
