"""VA-pi (arXiv 2512.19680): policy gradient on pixel reconstruction under teacher forcing, with a prior regulariser.

Of every image, G token sequences are drawn from the logits of one pass over the (noisy) true context, decoded by the
frozen tokenizer and rewarded by their likeness to the image; the loss is the clipped policy loss on group-relative
advantages + beta_ce cross-entropy on the true tokens + beta_kl KL to the start model. With `rollout="free"` the
sequences are drawn freely, token by token (AR-GRPO, arXiv 2508.06924), and rewarded from outside.

Deviations from the released code: the G samples share one pass (theirs repeats it for each); draw and update see the
same distribution (theirs drops classes and units in one of the two), so with one inner epoch the ratio is exactly 1 and
the draw reuses the update's own pass; no pass of the start model where no KL is wanted; filtering by top-k or top-p,
which biases their ratio, is not offered. Beyond the article, off by default: exact KL, several inner epochs, other
estimators, and credit by place (`credit="token"`).

Letters: `B` images, `G` samples of each, `N` tokens, `V` codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from consonar import distributed
from consonar.errors import UserError
from consonar.generators import conditions
from consonar.placement import to_device
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import derive_seed, generator, uniform
from consonar.training import losses, policy
from consonar.training.alignment import Alignment, AlignmentConfig, AlignmentTrainee
from consonar.training.credit import Influence, measure_influence, spatial_credit, token_grid
from consonar.types import Batch, Rollout

INFLUENCE_POSITIONS = 64
"""At how many positions of each probe image the decoder's receptive field is measured."""
DAPO_CLIP_HIGH = 0.28


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(AlignmentConfig):
    """VA-pi with the published settings of class-conditional LlamaGen."""

    kind: Literal["policy"] = "policy"
    rollout: Literal["teacher_forced", "free"] = "teacher_forced"
    """Tokens drawn under the image's own context (VA-pi), or freely by the cached sampler (AR-GRPO)."""
    estimator: Literal["grpo", "dr_grpo", "rloo", "gspo", "dapo", "reinforce"] = "grpo"
    """How rewards become advantages and ratios; gspo and dapo are grpo until `inner_epochs` is over 1."""
    group_size: int = 8
    """G, sequences drawn for each image."""
    temperature: float = 1.0
    """Of the draws and of the ratio."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of free rollouts; the ratio stays that of the conditional distribution."""
    advantage_clamp: float = 5.0
    """Advantages are clamped to plus and minus this; 0: not."""
    clip_range: float = 0.2
    """The ratio counts within 1 minus this ..."""
    clip_range_high: float | None = None
    """... and 1 plus this; None: `clip_range`, for dapo 0.28."""
    ce_weight: float = 0.1
    """beta_ce, cross-entropy on the true tokens."""
    kl_weight: float = 0.0
    """beta_kl, KL to the start model; the released text-to-image script has 0.01."""
    kl: Literal["k3", "exact"] = "k3"
    """Estimated at the drawn tokens, or summed over the vocabulary."""
    inner_epochs: int = 1
    """Updates on the same draws; over 1 the ratio leaves 1 and clipping matters."""
    credit: Literal["sequence", "token"] = "sequence"
    """One advantage for all tokens of a sequence, or each token its own from the error at its place."""
    smooth_credit: bool = False
    """Spread each token's credit over the decoder's receptive field, measured once (credit by token)."""
    baseline_decay: float = 0.9
    """Of the running mean that reinforce subtracts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 or (self.group_size == 1 and self.estimator != "reinforce"):
            raise UserError(
                f"objective.group_size: {self.group_size}, but {self.estimator} compares the samples of a group: "
                "2 or more (reinforce takes 1)"
            )
        if self.inner_epochs < 1:
            raise UserError(f"objective.inner_epochs: {self.inner_epochs} is not positive")
        for key in ("temperature", "clip_range"):
            if getattr(self, key) <= 0:
                raise UserError(f"objective.{key}: {getattr(self, key)} is not positive")
        for key in ("ce_weight", "kl_weight", "advantage_clamp", "guidance_scale"):
            if getattr(self, key) < 0:
                raise UserError(f"objective.{key}: {getattr(self, key)} is negative")
        if not 0 <= self.baseline_decay < 1:
            raise UserError(f"objective.baseline_decay: {self.baseline_decay} is not in [0, 1)")
        if self.rollout == "free":
            if self.credit == "token":
                raise UserError("objective.credit: 'token' compares an image with its original; choices here: sequence")
            for key in ("context_noise", "ce_weight"):
                if getattr(self, key):
                    raise UserError(
                        f"objective.{key}: {getattr(self, key)}, but free rollouts have no true context; set it to 0"
                    )

    @property
    def needs_prior(self) -> bool:
        return super().needs_prior or self.kl_weight > 0

    @property
    def clip_high(self) -> float:
        """The upper clip range."""
        if self.clip_range_high is None:
            return DAPO_CLIP_HIGH if self.estimator == "dapo" else self.clip_range
        return self.clip_range_high


class PolicyAlignment(Alignment):
    """Follows `consonar.types.Objective`."""

    def __init__(self, config: PolicyConfig, *args: Any, probe: Tensor | None = None, **settings: Any):
        """`probe` (n, 3, H, W): images from which the decoder's receptive field is measured, for `smooth_credit`."""
        self.config: PolicyConfig = config
        super().__init__(config, *args, **settings)
        self.influence: Influence | None = None
        if config.credit == "token":
            token_grid(self.tokenizer)  # found out now and not after the first draws
        if config.smooth_credit:
            assert probe is not None
            self.influence = measure_influence(
                self.tokenizer, self.tokenizer.encode(probe), num_positions=INFLUENCE_POSITIONS,
                rng=generator(self.seed, "influence"),
            )  # fmt: skip

    @torch.no_grad()
    def rollout(self, model: AlignmentTrainee, batch: Batch, step: int) -> Iterator[Rollout]:
        """Context and random numbers; with several inner epochs, free, or for reinforce the draws and advantages too.

        The running mean of reinforce moves once per step: were the draws left to the loss, every micro-batch would
        move it.
        """
        rollout = self.prepare(model, batch, step)
        tokens = rollout.batch.tokens
        assert tokens is not None
        if self.config.rollout == "free":
            yield from [self.run_free(model, rollout, step)] * self.config.inner_epochs
            return
        rng = generator(self.seed, "actions", step, 0)
        shape = (self.config.group_size, tokens.shape[1])
        rollout.extra["uniforms"] = to_device(
            self.own_rows(lambda n: uniform(rng, n, *shape, dtype=torch.float64), len(tokens)), tokens.device
        )
        if self.config.inner_epochs > 1 or self.config.estimator == "reinforce":
            with self.autocast():
                logits = model(rollout.context, rollout.condition).logits
            drawn = self.draw(model, logits, rollout)
            if self.config.inner_epochs > 1:
                drawn["old_log_probs"] = policy.token_log_probs(logits, drawn["actions"], self.config.temperature)
            rollout = replace(rollout, extra=drawn)
        yield from [rollout] * self.config.inner_epochs

    @torch.no_grad()
    def draw(self, model: Any, logits: Tensor, rollout: Rollout) -> dict[str, Any]:
        """Actions (B, G, N) from logits (B, N, V), their advantages (B, G, 1 or N), and what the log shows of them."""
        actions = policy.draw_actions(logits, rollout.extra["uniforms"], self.config.temperature)
        return {"actions": actions, **self.reward(model, actions, rollout.batch)}

    def reward(self, model: Any, actions: Tensor, batch: Batch) -> dict[str, Any]:
        """Advantages (B, G, 1 or N) of actions (B, G, N); for the log the rewards (B, G), their parts, and per group
        the spread and whether there is none (B, 1 or N)."""
        group, by_token = actions.shape[1], self.config.credit == "token"
        grid = token_grid(self.tokenizer) if by_token else None
        images = self.decode(actions.flatten(0, 1))  # (B * G, 3, H, W)
        total, parts, maps = self.rewards.measure(images, batch, grid=grid)
        rewards = total.view(-1, group, 1)
        if maps is not None:
            assert grid is not None
            influence = self.influence if self.config.smooth_credit else None
            rewards = spatial_credit(maps, influence, grid).unflatten(0, (-1, group))  # (B, G, N)
        # Equal draws are worth the same, whatever the rounding of their pictures and of a reward near 0.
        first = (actions[:, :, None] == actions[:, None]).all(-1).int().argmax(-1)  # (B, G): the first draw like each
        rewards = rewards.gather(1, first[..., None].expand_as(rewards))
        sizes = rewards if by_token else self.rewards.sizes(parts).view(-1, group, 1)
        trainee: AlignmentTrainee = distributed.unwrap(model)
        baseline = self.update_baseline(trainee, rewards) if self.config.estimator == "reinforce" else None
        advantages = policy.group_advantages(
            rewards, self.config.estimator, baseline=baseline, clamp=self.config.advantage_clamp, sizes=sizes
        )
        spread, tied = policy.group_spread(rewards, sizes)  # (B, 1 or N) each
        shown = {"reward": total, **{f"reward_{name}": part for name, part in parts.items()}}
        return {
            "advantages": advantages,
            **{key: value.view(-1, group) for key, value in shown.items()},
            "reward_spread": spread,
            "reward_ties": tied.float(),
        }

    def update_baseline(self, trainee: AlignmentTrainee, rewards: Tensor) -> Tensor:
        """The running mean before this batch (its own mean at the very first), (N,) or a scalar; then updates it."""
        mean = distributed.sum_over_ranks(rewards.mean((0, 1)), self.world) / self.world.size  # (1,) or (N,)
        first = trainee.num_baseline_updates == 0
        before = torch.where(first, mean, trainee.reward_baseline)
        trainee.reward_baseline.copy_(self.config.baseline_decay * before + (1 - self.config.baseline_decay) * mean)
        trainee.num_baseline_updates += 1
        return before if self.config.credit == "token" else before[:1]

    @torch.no_grad()
    def run_free(self, model: AlignmentTrainee, rollout: Rollout, step: int) -> Rollout:
        """G free-running sequences of each condition, with guidance if so configured, and their advantages."""
        assert rollout.batch.tokens is not None
        group, count = self.config.group_size, len(rollout.batch.tokens)
        repeated = conditions.rows(rollout.condition, _repeat_rows(count, group, self.world.device))
        first = derive_seed(self.seed, "free", step, 0)
        places = self.own_rows(lambda n: torch.arange(n * group).view(n, group), count).flatten().tolist()
        sampler = SamplerConfig(temperature=self.config.temperature, guidance_scale=self.config.guidance_scale)
        with self.autocast():
            tokens, _ = sample_tokens(model.generator, repeated, [first + place for place in places], sampler)
        actions = tokens.clone().view(count, group, -1)  # a clone: made in inference mode, it could not be trained on
        drawn = {"actions": actions, **self.reward(model, actions, rollout.batch)}
        if self.config.inner_epochs > 1:
            with self.autocast():
                logits = model(actions.flatten(0, 1), repeated).logits
            drawn["old_log_probs"] = self.free_log_probs(logits, actions)
        return replace(rollout, extra=drawn)

    def free_log_probs(self, logits: Tensor, actions: Tensor) -> Tensor:
        """(B, G, N) <- logits (B * G, N, V), each row's own."""
        flat = policy.token_log_probs(logits, actions.flatten(0, 1)[:, None], self.config.temperature)
        return flat.view(actions.shape)

    def loss(self, model: Any, rollout: Rollout, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass over the images' contexts, whatever G is; free rollouts are contexts of their own."""
        assert rollout.batch.tokens is not None and rollout.context is not None
        config = self.config
        drawn = rollout.extra
        if config.rollout == "teacher_forced":
            logits = model(rollout.context, rollout.condition).logits
            if "actions" not in drawn:
                drawn = self.draw(model, logits.detach(), rollout)
            log_probs = policy.token_log_probs(logits, drawn["actions"], config.temperature)
        else:
            count, group = drawn["actions"].shape[:2]
            chosen = _repeat_rows(count, group, rollout.context.device)
            logits = model(drawn["actions"].flatten(0, 1), conditions.rows(rollout.condition, chosen)).logits
            log_probs = self.free_log_probs(logits, drawn["actions"])
        old_log_probs = drawn.get("old_log_probs", log_probs.detach())
        ratio = policy.probability_ratio(log_probs, old_log_probs, whole_sequence=config.estimator == "gspo")
        terms = {key: value.mean() for key, value in drawn.items() if key.startswith("reward")}
        terms |= {
            "policy": policy.clipped_policy_loss(ratio, drawn["advantages"], config.clip_range, config.clip_high).mean()
        }
        total = terms["policy"]
        if config.rollout == "teacher_forced":
            terms["cross_entropy"] = losses.next_token_loss(logits, rollout.batch.tokens)
            total = total + config.ce_weight * terms["cross_entropy"]
        if config.kl_weight > 0:
            terms["kl"] = self.prior_divergence(logits, log_probs, drawn["actions"], rollout)
            total = total + config.kl_weight * terms["kl"]
        with torch.no_grad():
            terms["entropy"] = losses.entropy(logits).mean()
            terms["ratio_deviation"] = (ratio - 1).abs().max()
            terms["clip_fraction"] = policy.clip_fraction(ratio, config.clip_range, config.clip_high)
        return total, terms

    def prior_divergence(self, logits: Tensor, log_probs: Tensor, actions: Tensor, rollout: Rollout) -> Tensor:
        """Mean KL to the start model per token, nats."""
        free = self.config.rollout == "free"
        if free:
            count, group = actions.shape[:2]
            repeated = conditions.rows(rollout.condition, _repeat_rows(count, group, actions.device))
            rollout = replace(rollout, context=actions.flatten(0, 1), condition=repeated)
        prior = self.prior_logits(rollout)
        temperature = self.config.temperature
        if self.config.kl == "exact":
            return policy.kl_exact(logits.float() / temperature, prior / temperature).mean()
        prior_log_probs = (
            self.free_log_probs(prior, actions) if free else policy.token_log_probs(prior, actions, temperature)
        )
        return policy.kl_k3(log_probs, prior_log_probs).mean()


def _repeat_rows(count: int, group: int, device: torch.device) -> Tensor:
    """0 0 .. 1 1 .., each `group` times."""
    return torch.arange(count, device=device).repeat_interleave(group)
