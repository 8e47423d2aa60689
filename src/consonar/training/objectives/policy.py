"""VA-pi (arXiv 2512.19680): policy gradient on pixel reconstruction under teacher forcing, with a prior regulariser.

Of every image, G token sequences are drawn from the logits of one pass over the (noisy) true context, decoded by the
frozen tokenizer and rewarded by their likeness to the image; the loss is the clipped policy loss on group-relative
advantages + beta_ce cross-entropy on the true tokens + beta_kl KL to the start model. With `rollout="free"` it is
AR-GRPO (`free`).

Deviations from VA-pi's code: the G samples share one pass (theirs repeats it for each); draw and update see the same
distribution (theirs drops classes and units in one of the two), so with one inner epoch the ratio is exactly 1 and the
draw reuses the update's own pass; no pass of the start model where no KL is wanted; filtering by top-k or top-p, which
biases their ratio, is not offered. Beyond the article, off by default: exact KL, several inner epochs, other
estimators, credit by place (`credit="token"`), the start model's entropy held (`entropy`), reAR's heads kept
(`embedding_weight`).

Letters: `B` images, `G` samples of each, `N` tokens, `V` codes.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from consonar import distributed, parallel, records
from consonar.errors import UserError
from consonar.options import Count, Divisor, NotNegative, Positive, ReadOnlyWith, ShareBelowOne
from consonar.seeding import generator, uniform
from consonar.training import losses
from consonar.training import policy_gradient as policy
from consonar.training.credit import measure_influence, spatial_credit, token_grid
from consonar.training.objectives.alignment import Alignment, AlignmentConfig, AlignmentTrainee, Forced
from consonar.training.objectives.base import alignment_terms
from consonar.training.rewards import TIES
from consonar.types import Condition, EncodedBatch, ImageBatch

INFLUENCE_POSITIONS, ORDER_POSITIONS = 64, 8
"""At how many positions of each probe image the decoder's receptive field, or the tokens' order alone, is measured."""
DAPO_CLIP_HIGH = 0.28

FREE = ReadOnlyWith(lambda given: given.rollout == "free", "{}rollout 'free'")
EPOCHS = ReadOnlyWith(lambda given: given.inner_epochs > 1, "{}inner_epochs over 1: until then every ratio is 1")
KL = ReadOnlyWith(lambda given: given.kl_weight > 0, "{}kl_weight over 0")
TOKEN_RATIO = ReadOnlyWith(
    lambda given: given.estimator != "gspo", "an {}estimator with a ratio for each token, so not 'gspo'"
)
TOKEN_CREDIT = ReadOnlyWith(lambda given: given.credit == "token", "{}credit 'token'")
HELD = ReadOnlyWith(lambda given: given.entropy != "free", "{}entropy 'mean' or 'position'")
FORCED = ReadOnlyWith(lambda given: given.rollout == "teacher_forced", "{}rollout 'teacher_forced'")
BASELINE = ReadOnlyWith(lambda given: given.estimator == "reinforce", "{}estimator 'reinforce'")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(AlignmentConfig):
    """VA-pi with the published settings of class-conditional LlamaGen."""

    kind: Literal["policy"] = "policy"
    rollout: Literal["teacher_forced", "free"] = "teacher_forced"
    """Tokens drawn under the image's own context (VA-pi), or freely by the cached sampler (AR-GRPO)."""
    estimator: policy.Estimator = "grpo"
    """How rewards become advantages and ratios; gspo and dapo are grpo until `inner_epochs` is over 1."""
    group_size: Count = 8
    """G, sequences drawn for each image."""
    temperature: Divisor = 1.0
    """Of the draws and of the ratio."""
    guidance_scale: Annotated[NotNegative, FREE] = 1.0
    """Classifier-free guidance of free rollouts; the ratio stays that of the conditional distribution."""
    advantage_clamp: NotNegative = 5.0
    """Advantages are clamped to plus and minus this; 0: not."""
    clip_range: Annotated[Positive, EPOCHS] = 0.2
    """The ratio counts within 1 minus this ..."""
    clip_range_high: Annotated[NotNegative | None, EPOCHS] = None
    """... and 1 plus this; None: `clip_range`, for dapo 0.28."""
    ce_weight: NotNegative = 0.1
    """beta_ce, cross-entropy on the true tokens."""
    kl_weight: NotNegative = 0.0
    """beta_kl, KL to the start model; the released text-to-image script has 0.01."""
    kl: Annotated[Literal["k3", "exact"], KL] = "k3"
    """Estimated at the drawn tokens, or summed over the vocabulary."""
    entropy: Literal["free", "mean", "position"] = "free"
    """Held at the start model's in the same context: not, its mean over an image, or that of every position."""
    entropy_weight: Annotated[Positive, HELD] = 1.0
    """Of the squared deviation in nats."""
    embedding_weight: Annotated[NotNegative, FORCED] = 0.0
    """lambda, codebook alignment by the heads of the reAR run that `init` is, which are kept and trained on."""
    inner_epochs: Count = 1
    """Updates on the same draws; over 1 the ratio leaves 1 and clipping matters."""
    credit: Annotated[Literal["sequence", "token"], TOKEN_RATIO] = "sequence"
    """One advantage for all tokens of a sequence, or each token its own from the error at its place."""
    smooth_credit: Annotated[bool, TOKEN_CREDIT] = False
    """Spread each token's credit over the decoder's receptive field, measured once (credit by token)."""
    baseline_decay: Annotated[ShareBelowOne, BASELINE] = 0.9
    """Of the running mean that reinforce subtracts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size == 1 and self.estimator != "reinforce":
            raise UserError(
                f"objective.group_size: 1, but {self.estimator} compares the samples of a group: 2 or more (reinforce "
                "takes 1)"
            )
        if self.rollout == "free":
            if self.credit == "token":
                raise UserError("objective.credit: 'token' compares an image with its original; choices here: sequence")
            for key in ("context_noise", "ce_weight"):
                if getattr(self, key):
                    raise UserError(
                        f"objective.{key}: {getattr(self, key)}, but free rollouts have no true context; set it to 0"
                    )

    @property
    def updates(self) -> int:
        return self.inner_epochs

    def needs_prior(self, *, validated: bool = True) -> bool:
        return super().needs_prior(validated=validated) or self.asks_prior

    @property
    def asks_prior(self) -> bool:
        """Whether the loss is of the start model's distributions as well."""
        return self.kl_weight > 0 or self.entropy != "free"

    @property
    def keeps_heads(self) -> bool:
        return self.embedding_weight > 0

    @property
    def clip_high(self) -> float:
        """The upper clip range."""
        if self.clip_range_high is None:
            return DAPO_CLIP_HIGH if self.estimator == "dapo" else self.clip_range
        return self.clip_range_high


@dataclass(frozen=True)
class Drawn:
    """Sequences drawn for every image, and what they are worth."""

    actions: Tensor
    """(B, G, N) int64."""
    advantages: Tensor
    """(B, G, 1 or N)."""
    shown: dict[str, Tensor]
    """For the log: the rewards (B, G), their parts, and per group the spread and whether it is none (B, 1 or N)."""
    old_log_probs: Tensor | None = None
    """(B, G, N) of the first of several updates, which writes them in the place of NaN; None: there is one."""


@dataclass(frozen=True)
class PolicyForced(Forced):
    """With the numbers that the draws are made from, and the draws where the loss does not make them."""

    uniforms: Tensor
    """(B, G, N) float64 in [0, 1)."""
    drawn: Drawn | None = None


class PolicyGradient(Alignment):
    """What VA-pi and AR-GRPO share: from rewards to advantages, and the clipped loss."""

    config: PolicyConfig

    def __init__(self, config: PolicyConfig, *args: Any, **settings: Any):
        super().__init__(config, *args, **settings)
        self.grid = token_grid(self.tokenizer) if config.credit == "token" else None  # now, not after the first draws
        self.influence: Tensor | None = None
        if self.grid is not None:
            self.rewards.check_places()
        if self.grid is not None and self.probe is not None:
            tokens, rng = self.tokenizer.encode(self.probe()), generator(self.seed, "influence")
            positions = INFLUENCE_POSITIONS if config.smooth_credit else ORDER_POSITIONS
            found = measure_influence(self.tokenizer, tokens, num_positions=positions, rng=rng)
            self.about = found.about
            if config.smooth_credit:
                self.influence = records.to_device(found.matrix(self.grid), tokens.device)
        assert self.influence is not None or not config.smooth_credit, "images to measure the decoder with"

    @torch.no_grad()
    def reward(self, trainee: AlignmentTrainee, actions: Tensor, batch: EncodedBatch) -> Drawn:
        """What actions (B, G, N) drawn for the images of `batch` are worth."""
        group = actions.shape[1]
        total, parts, maps = self.judge(actions.flatten(0, 1), batch, self.grid)
        rewards = total.view(-1, group, 1)
        if self.grid is not None and maps is not None:
            rewards = spatial_credit(maps, self.influence, self.grid).unflatten(0, (-1, group))  # (B, G, N)
        # Equal draws are worth the same, whatever the rounding of their pictures and of a reward near 0.
        first = (actions[:, :, None] == actions[:, None]).all(-1).int().argmax(-1)  # (B, G): the first draw like each
        rewards = rewards.gather(1, first[..., None].expand_as(rewards))
        sizes = rewards if self.grid is not None else self.rewards.sizes(parts).view(-1, group, 1)
        baseline = self.update_baseline(trainee, rewards) if self.config.estimator == "reinforce" else None
        advantages = policy.group_advantages(
            rewards, self.config.estimator, baseline=baseline, clamp=self.config.advantage_clamp, sizes=sizes
        )
        spread, tied = policy.group_spread(rewards, sizes)  # (B, 1 or N) each
        shown = {"reward": total, **{f"reward_{name}": part for name, part in parts.items()}}
        shown = {key: value.view(-1, group) for key, value in shown.items()}
        if group > 1:  # a single draw is compared with the running mean
            values = torch.stack(list(parts.values())).view(-1, group)  # (rewards * B, G)
            spreads, ties = (found.float().chunk(len(parts)) for found in policy.group_spread(values))
            for name, of_part, tied_part in zip(parts, spreads, ties, strict=True):
                shown |= {f"reward_spread_{name}": of_part, f"{TIES}{name}": tied_part}
        old = actions.new_full(actions.shape, math.nan, dtype=torch.float32) if self.config.updates > 1 else None
        return Drawn(actions, advantages, {**shown, "reward_spread": spread, "reward_ties": tied.float()}, old)

    def update_baseline(self, trainee: AlignmentTrainee, rewards: Tensor) -> Tensor:
        """The running mean before this batch (its own mean at the very first), (N,) or a scalar; then updates it."""
        mean = distributed.sum_over_ranks(rewards.mean((0, 1)), self.world) / self.world.size  # (1,) or (N,)
        first = trainee.num_baseline_updates == 0
        before = torch.where(first, mean, trainee.reward_baseline)
        trainee.reward_baseline.copy_(self.config.baseline_decay * before + (1 - self.config.baseline_decay) * mean)
        trainee.num_baseline_updates += 1
        return before if self.config.credit == "token" else before[:1]

    def policy_loss(
        self, seen: losses.Seen, drawn: Drawn, context: Tensor, condition: Condition, tokens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss of logits on (context, condition), and its regularisers: cross-entropy on `tokens`, and from
        one pass of the start model the entropy held at its, and KL to it.

        `seen` is of these logits at the temperature of the draws. The terms also say what was shown of the draws, and
        how far the ratio has moved.
        """
        config, actions, plain = self.config, drawn.actions, seen
        of_row = actions.view(len(seen.logits), -1, actions.shape[-1])  # (B, G, N), or (B * G, 1, N) of free rollouts
        true = of_row[:, :0] if tokens is None else tokens[:, None]  # (B, 0 or 1, N)
        if config.temperature == 1:
            found, entropy = seen.with_gradient(torch.cat([of_row, true], 1))
            log_probs, of_true = found.split([of_row.shape[1], true.shape[1]], 1)
        else:
            plain = losses.look(seen.logits)  # what cross-entropy and entropy are of
            log_probs, (of_true, entropy) = seen.log_probs(of_row), plain.with_gradient(true)
        log_probs = log_probs.reshape(actions.shape)
        old = log_probs.detach()
        if (kept := drawn.old_log_probs) is not None:  # of the first update's own pass: another rounds otherwise
            old = kept.copy_(old.where(kept.isnan(), kept))
        ratio = policy.probability_ratio(log_probs, old, whole_sequence=config.estimator == "gspo")
        terms = {key: value.mean() for key, value in drawn.shown.items()}
        loss = policy.clipped_policy_loss(ratio, drawn.advantages, config.clip_range, config.clip_high)
        total = terms["policy"] = loss.mean()
        with torch.no_grad():
            terms["entropy"] = plain.entropy.mean()
            terms["ratio_deviation"] = (ratio - 1).abs().max()
            terms["clip_fraction"] = policy.clip_fraction(ratio, config.clip_range, config.clip_high)
        if tokens is not None:
            terms["cross_entropy"] = -of_true.mean()
            total = total + config.ce_weight * terms["cross_entropy"]
        if config.asks_prior:
            prior = self.prior_logits(context, condition)
        if config.entropy != "free":
            start = losses.look(prior).entropy
            terms["entropy_start"], terms["entropy_deviation"] = start.mean(), (plain.entropy - start).abs().mean()
            terms["entropy_penalty"] = policy.entropy_penalty(entropy, start, of_mean=config.entropy == "mean")
            total = total + config.entropy_weight * terms["entropy_penalty"]
        if config.kl_weight > 0:
            if config.kl == "exact":
                kl = policy.kl_exact(seen.logits, prior, config.temperature)
            else:
                of_prior = policy.token_log_probs(prior, of_row, config.temperature)
                kl = policy.kl_k3(log_probs, of_prior.view(actions.shape))
            terms["kl"] = kl.mean()
            total = total + config.kl_weight * terms["kl"]
        return total, terms


class TeacherForcedPolicy(PolicyGradient):
    """VA-pi. Follows `consonar.types.Objective`."""

    @torch.no_grad()
    def prepare(self, model: AlignmentTrainee, batch: ImageBatch, step: int) -> PolicyForced:
        """Context and random numbers; with several inner epochs or for reinforce the draws and advantages too.

        The running mean of reinforce moves once per step: were the draws left to the loss, every micro-batch would
        move it.
        """
        forced = super().prepare(model, batch, step)
        rng = generator(self.seed, "actions", step, 0)
        count, length = forced.batch.tokens.shape
        shape = (self.config.group_size, length)
        uniforms = self.world.own_rows(lambda n: uniform(rng, n, *shape, dtype=torch.float64), count)
        prepared = PolicyForced(**vars(forced), uniforms=records.to_device(uniforms, forced.context.device))
        if self.config.updates == 1 and self.config.estimator != "reinforce":
            return prepared
        with self.autocast():
            seen = self.look(model(forced.context, forced.condition).logits, prepared)
        return replace(prepared, drawn=self.reward(model, seen.drawn, forced.batch))

    def look(self, logits: Tensor, prepared: PolicyForced) -> losses.Seen:
        """The pass over logits (B, N, V) in which sequences are drawn from them, unless they were before."""
        return losses.look(logits, self.config.temperature, None if prepared.drawn else prepared.uniforms)

    def loss(self, model: AlignmentTrainee, prepared: PolicyForced, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss from one pass over the images' contexts, whatever G is; with its regularisers."""
        prediction = model(prepared.context, prepared.condition)
        seen, tokens = self.look(prediction.logits, prepared), prepared.batch.tokens
        drawn = prepared.drawn or self.reward(parallel.unwrap(model), seen.drawn, prepared.batch)
        total, terms = self.policy_loss(seen, drawn, prepared.context, prepared.condition, tokens)
        for name, term in alignment_terms(prediction.taps, self.tokenizer, tokens).items():
            terms[name] = term
            total = total + self.config.embedding_weight * term
        return total, terms
