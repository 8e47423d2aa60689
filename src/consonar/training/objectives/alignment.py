"""What every post-training method shares: noisy teacher-forced context, frozen decoder, rewards, start model, guard.

VA-pi (arXiv 2512.19680) and its controls (`policy`, `free`, `controls`) differ in the loss alone: images, tokens,
noise, steps and measurements are the same code and, for equal seeds, the same numbers. Dropout is off throughout, so
that tokens are drawn from the distribution that is updated.

Letters: `B` images, `N` tokens, `V` codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from consonar import memory
from consonar.distributed import World
from consonar.errors import UserError
from consonar.float32 import exact
from consonar.options import CountOrZero, NotNegative, Options, Range, ReadOnlyWith, Share
from consonar.records import to_device
from consonar.sampling.pictures import bytes_of_image
from consonar.seeding import generator, uniform
from consonar.training import losses, noise
from consonar.training import policy_gradient as policy
from consonar.training.lora import StartModel
from consonar.training.objectives.base import ObjectiveConfig, drop_classes, means
from consonar.training.rewards import Measured, Resources, build_rewards, check_rewards
from consonar.training.trainee import HeadSpec, Trainee
from consonar.types import Condition, EncodedBatch, Generator, Grid, ImageBatch, Tokenizer

CHUNK = 64
"""Images decoded and rewarded at once where memory does not say."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Options):
    """The band that the policy must stay in; outside of it the run stops with a warning and keeps what it has."""

    section = "objective.guard"

    min_entropy: NotNegative | None = None
    """Lowest teacher-forced entropy, nats."""
    max_entropy: NotNegative | None = None
    """Highest teacher-forced entropy, nats."""
    max_kl: NotNegative | None = None
    """Largest KL to the start model, nats per token; read with data for validation, or a `kl_weight`."""
    measure_kl: bool = True
    """Keep the start model in memory and measure KL to it at every validation, where there are data for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.min_entropy, self.max_entropy
        if low is not None and high is not None and low > high:
            raise UserError(f"objective.guard.min_entropy: {low} is above objective.guard.max_entropy {high}")
        if self.max_kl is not None and not self.measure_kl:
            raise UserError("objective.guard.measure_kl: False, but objective.guard.max_kl needs the KL")

    def breach(self, values: Mapping[str, float]) -> str | None:
        """What is outside of the band in these logged values; None when nothing is, or nothing is measured here."""
        for key, low, high in (("entropy", self.min_entropy, self.max_entropy), ("kl", None, self.max_kl)):
            value = values.get(key)
            if value is not None and low is not None and value < low:
                return f"{key} {value:.4g} is below objective.guard.min_{key} {low:g}"
            if value is not None and high is not None and value > high:
                return f"{key} {value:.4g} is above objective.guard.max_{key} {high:g}"
        return None


NOISE = ReadOnlyWith(lambda given: given.context_noise > 0, "{}context_noise over 0")
DISCRIMINATOR = ReadOnlyWith(lambda given: "patch-discriminator" in given.rewards, "'patch-discriminator' in {}rewards")
CLIP = ReadOnlyWith(lambda given: "clip" in given.rewards, "'clip' in {}rewards")
HPSV2 = ReadOnlyWith(lambda given: "hpsv2" in given.rewards, "'hpsv2' in {}rewards")
LPIPS = ReadOnlyWith(
    lambda given: given.measures_lpips,
    "'lpips' in {}rewards (or {}perceptual 'lpips', in {}kind 'straight_through')",
)


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(ObjectiveConfig):
    """What all post-training objectives have."""

    context_noise: Share = 0.0
    """xi: probability that a context token is replaced."""
    noise_schedule: Annotated[Literal["constant", "linear", "truncated_linear"], NOISE] = "constant"
    """How xi moves over training: constant, or down to 0 as reAR's schedules do."""
    corruption: Annotated[Literal["uniform", "drawn"], NOISE] = "uniform"
    """What replaces a token: any code, or what the model draws there under the true context."""
    class_dropout: Share = 0.0
    """Probability of training an image without its class, so that guidance keeps its null distribution."""
    rewards: dict[str, Annotated[float, Range()]] = field(default_factory=lambda: {"mse": 1.0, "lpips": 1.0})
    """Weight of each reward by name or dotted path; what is measured, and what a policy maximises."""
    lpips_weights: Annotated[str | None, LPIPS] = None
    """VGG16 weights for the reward lpips: a file or hf:owner/repository/file; None: vgg16-397923af.pth in the cache."""
    discriminator: Annotated[str | None, DISCRIMINATOR] = None
    """Folder of a discriminator, for the reward patch-discriminator."""
    clip: Annotated[str | None, CLIP] = None
    """For the reward clip: a folder with a CLIP and its tokenizer as transformers saves them, or OWNER/NAME."""
    hpsv2: Annotated[str | None, HPSV2] = None
    """For the reward hpsv2: the same, trained on preferences: PickScore, or HPSv2 converted from open_clip."""
    chunk: CountOrZero = 0
    """Images decoded and rewarded at once; bounds memory. 0: on a GPU what a quarter of free memory holds, else 64."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When to stop early."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise UserError("objective.rewards: empty; give at least one, e.g. mse 1.0")
        check_rewards(self.rewards, {key: getattr(self, key) for key in ("discriminator", "clip", "hpsv2")})

    def needs_prior(self, *, validated: bool = True) -> bool:
        return self.guard.measure_kl and validated

    def check_guard(self, *, validated: bool) -> None:
        """`UserError` for a bound on the KL in a run without data for validation, where no line would have one."""
        if self.guard.max_kl is not None and not validated and not getattr(self, "kl_weight", 0):
            without = "with data for validation, and there are none, or with objective.kl_weight over 0"
            raise UserError(f"objective.guard.max_kl: {self.guard.max_kl} is read only {without}; remove it")

    @property
    def measures_lpips(self) -> bool:
        """Whether LPIPS is one of the rewards, or of what the loss has beside them."""
        return "lpips" in self.rewards

    @property
    def drops_all_classes(self) -> bool:
        return self.class_dropout == 1


class AlignmentTrainee(Trainee):
    """A trained generator in post-training. Dropout stays off; the running reward of REINFORCE is kept with it."""

    def __init__(self, model: Generator, heads: tuple[HeadSpec, ...] = ()):
        super().__init__(model, heads)
        self.register_buffer("reward_baseline", torch.zeros(model.num_tokens))
        self.register_buffer("num_baseline_updates", torch.zeros(()))
        self.reward_baseline: Tensor
        self.num_baseline_updates: Tensor

    def train(self, mode: bool = True) -> AlignmentTrainee:
        """Stays in evaluation mode, whatever the loop asks for."""
        return super().train(False)


@dataclass(frozen=True)
class Forced:
    """Images with their tokens, ready for a teacher-forced pass."""

    batch: EncodedBatch
    context: Tensor
    """(B, N) int64: the tokens fed, maybe corrupted."""
    condition: Condition
    """The condition fed, maybe dropped to the null condition."""


class Alignment:
    """The shared part of a post-training objective; follows `consonar.types.Objective` but for `loss`.

    `prior` is the frozen start model, or None where no KL is wanted; `probe` reads images (n, 3, H, W) of the data, for
    what is measured of the decoder. Raises `UserError` for rewards that cannot be built.
    """

    config: AlignmentConfig
    """That of a subclass is declared there."""

    def __init__(
        self,
        config: AlignmentConfig,
        tokenizer: Tokenizer,
        prior: Generator | StartModel | None,
        *,
        total_steps: int,
        seed: int,
        world: World,
        autocast_dtype: torch.dtype | None = None,
        probe: Callable[[], Tensor] | None = None,
    ):
        self.config, self.tokenizer, self.prior, self.world, self.probe = config, tokenizer, prior, world, probe
        self.total_steps, self.seed, self.autocast_dtype = total_steps, seed, autocast_dtype
        files = config.lpips_weights, config.discriminator, config.clip, config.hpsv2
        resources = Resources(world.device, autocast_dtype, *files)
        self.rewards = build_rewards(config.rewards, resources, chunk=config.chunk or CHUNK)
        self.about: tuple[str, ...] = ()
        self.bytes_of_image = 0  # measured when the first are decoded
        self.rewards.check_size(tokenizer.image_size)

    def autocast(self) -> torch.autocast:
        """The precision of the update, for passes of the generator outside of it."""
        return torch.autocast(self.world.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def noise_rate(self, step: int) -> float:
        """xi at this step."""
        return noise.max_noise_rate(
            self.config.noise_schedule, step / self.total_steps, max_rate=self.config.context_noise
        )

    def encode(self, batch: ImageBatch) -> EncodedBatch:
        with exact(batch.images.device):
            tokens = self.tokenizer.encode(batch.images)
        return EncodedBatch(batch.images, batch.condition, batch.indices, batch.captions, tokens=tokens)

    @torch.no_grad()
    def prepare(self, model: AlignmentTrainee, batch: ImageBatch, step: int) -> Forced:
        """Tokens of the images, a noisy context, maybe a dropped condition; each from a generator of its own."""
        encoded = self.encode(batch)
        tokens, condition, rate = encoded.tokens, encoded.condition, self.noise_rate(step)
        if (share := self.config.class_dropout) > 0:
            condition = drop_classes(model.generator, condition, share, self.seed, step, self.world)
        context = tokens
        if rate > 0:
            rates, rng = torch.full((len(tokens),), rate), generator(self.seed, "noise", step, 0)
            drawn = self.draw(model, tokens, condition, step) if self.config.corruption == "drawn" else None
            vocab_size = self.tokenizer.vocab_size
            context, _ = noise.corrupt_tokens(tokens, rates, vocab_size, rng, self.world, replacement=drawn)
        return Forced(encoded, context, condition)

    @torch.no_grad()
    def draw(self, model: AlignmentTrainee, tokens: Tensor, condition: Condition, step: int) -> Tensor:
        """A token drawn by the model at every place under the true ones before it: (B, N) of (B, N)."""
        with self.autocast():
            logits = model(tokens, condition).logits
        rng, shape = generator(self.seed, "context", step, 0), (1, tokens.shape[1])
        uniforms = self.world.own_rows(lambda n: uniform(rng, n, *shape, dtype=torch.float64), len(tokens))
        return losses.look(logits, uniforms=to_device(uniforms, logits.device)).drawn[:, 0]

    @torch.no_grad()
    def judge(self, tokens: Tensor, batch: EncodedBatch, grid: Grid | None = None) -> Measured:
        """What `Rewards.measure` finds of the images of tokens (B * G, N), G for each row of the batch."""
        if self.config.chunk == 0 and tokens.device.type == "cuda":
            with exact(tokens.device):
                self.bytes_of_image = self.bytes_of_image or bytes_of_image(self.tokenizer, tokens[:1])
            # Half of what is free is for two chunks: while one is judged, the next is decoded.
            fitting = memory.bytes_free(tokens.device) // 4 // self.bytes_of_image
            self.rewards.chunk = 1 << max(0, fitting.bit_length() - 1)  # a power of two, so that it seldom changes
        return self.rewards.measure(tokens, batch, grid=grid, decode=self.decode)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (n, 3, H, W) of tokens (n, N), not clamped, in chunks and in float32 whatever the update runs in."""
        with exact(tokens.device):
            return torch.cat([self.tokenizer.decode(part) for part in tokens.split(self.rewards.chunk)])

    @torch.no_grad()
    def prior_logits(self, context: Tensor, condition: Condition) -> Tensor:
        """(B, N, V) of the start model on this context (B, N), in what the update runs in."""
        assert self.prior is not None, "kept where a KL is wanted (`AlignmentConfig.needs_prior`)"
        with self.autocast():
            logits, _ = self.prior(context, condition)
        return logits

    def state(self, step: int) -> dict[str, float]:
        """What the log shows beside the terms."""
        return {"noise_rate": self.noise_rate(step), "chunk": self.rewards.chunk}

    def breach(self, values: Mapping[str, float]) -> str | None:
        """Why the run should stop here; see `GuardConfig`."""
        return self.config.guard.breach(values)

    @torch.no_grad()
    def validate(self, model: AlignmentTrainee, batches: Iterator[ImageBatch]) -> dict[str, float]:
        """Under a clean context with the true class, on held-out images: means over all of them.

        cross_entropy, entropy, kl (to the start model, exact) and entropy_deviation (of each token's entropy from the
        start model's, without sign) in nats per token; accuracy 0..1; reward and its parts of one draw of every token,
        the same uniform numbers whatever the model is (common random numbers).
        """
        measured: list[tuple[int, dict[str, Tensor]]] = []
        for batch in batches:
            encoded = self.encode(batch)
            tokens = encoded.tokens
            with self.autocast():
                logits = model(tokens, batch.condition).logits
            rng = generator(self.seed, "validation", sum(count for count, _ in measured))
            uniforms = uniform(rng, len(tokens), 1, tokens.shape[1], dtype=torch.float64)
            seen = losses.look(logits, uniforms=to_device(uniforms, logits.device))
            total, parts, _ = self.judge(seen.drawn[:, 0], encoded)
            values = {
                "cross_entropy": losses.next_token_loss(logits, tokens),
                "accuracy": losses.next_token_accuracy(logits, tokens),
                "entropy": seen.entropy.mean(),
                "reward": total.mean(),
            }
            values |= {f"reward_{name}": part.mean() for name, part in parts.items()}
            if self.prior is not None:
                prior = self.prior_logits(tokens, batch.condition)
                values["kl"] = policy.kl_exact(logits, prior).mean()
                values["entropy_deviation"] = (seen.entropy - losses.look(prior).entropy).abs().mean()
            measured.append((len(tokens), values))
        return means(measured)
