"""AR-GRPO (arXiv 2508.06924): the G sequences of each condition are drawn freely, token by token, and are contexts of
their own, so that an update passes over all B * G of them; there is no cross-entropy. Its settings: `PolicyConfig`.

Letters: `B` images, `G` samples of each, `N` tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from consonar import parallel, records
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import derive_seed
from consonar.training import losses
from consonar.training.lora import merged
from consonar.training.objectives.alignment import AlignmentTrainee, Forced
from consonar.training.objectives.policy import Drawn, PolicyGradient
from consonar.types import ImageBatch


@dataclass(frozen=True)
class FreeRollout(Forced):
    """With sequences that were drawn freely; the context is not read."""

    drawn: Drawn


class FreePolicy(PolicyGradient):
    """AR-GRPO. Follows `consonar.types.Objective`."""

    @torch.no_grad()
    def prepare(self, model: AlignmentTrainee, batch: ImageBatch, step: int) -> FreeRollout:
        """G free-running sequences of each condition, with guidance if so configured, and their advantages."""
        forced = super().prepare(model, batch, step)
        group, count = self.config.group_size, len(forced.batch.tokens)
        repeated = records.repeat(forced.condition, group)
        first = derive_seed(self.seed, "free", step, 0)
        places = self.world.own_rows(lambda n: torch.arange(n * group).view(n, group), count).flatten().tolist()
        sampler = SamplerConfig(temperature=self.config.temperature, guidance_scale=self.config.guidance_scale)
        with self.autocast(), parallel.whole(model) as whole:
            tokens, _ = sample_tokens(merged(whole).generator, repeated, [first + place for place in places], sampler)
        actions = tokens.clone().view(count, group, -1)  # a clone: made in inference mode, it could not be trained on
        return FreeRollout(**vars(forced), drawn=self.reward(model, actions, forced.batch))

    def loss(self, model: AlignmentTrainee, prepared: FreeRollout, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss from a pass over each drawn sequence, with KL to the start model."""
        context = prepared.drawn.actions.flatten(0, 1)
        condition = records.repeat(prepared.condition, self.config.group_size)
        seen = losses.look(model(context, condition).logits, self.config.temperature)
        return self.policy_loss(seen, prepared.drawn, context, condition)
