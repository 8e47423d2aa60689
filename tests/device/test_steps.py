"""Steps of every objective on the device: the losses of the CPU, and nothing waits that is not named here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts.test_alignment import CASES, VAPI
from contracts.test_objectives import CONSISTENCY, RECONSTRUCTION

from consonar.components import load_tokenizer
from consonar.distributed import World
from consonar.records import to_device
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.training.aside import State
from consonar.training.loop import update
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.autoregressive import Autoregressive, NoiseConfig
from consonar.training.objectives.base import ALONE
from consonar.training.objectives.controls import StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import Reconstruction, TokenizerTrainee
from consonar.training.optim import build_optimizer
from consonar.training.trainee import Trainee
from consonar.types import EncodedBatch, ImageBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONSISTENCY_CASES = CONSISTENCY | {
    schedule: replace(CONSISTENCY["rear"], noise=NoiseConfig(schedule=schedule, max_rate=0.5))
    for schedule in ("uniform", "truncated_linear")
}
ALIGNMENT_CASES = CASES | {"dropped classes": replace(VAPI, class_dropout=0.5)}
RECONSTRUCTION_CASES = RECONSTRUCTION | {"revived": replace(RECONSTRUCTION["plain"], revive_after=1)}
CASES_BY_NAME = {
    **{f"consistency, {name}": config for name, config in CONSISTENCY_CASES.items()},
    **{f"post-training, {name}": config for name, config in ALIGNMENT_CASES.items()},
    **{f"tokenizer, {name}": config for name, config in RECONSTRUCTION_CASES.items()},
}
IN_BF16 = ("consistency, rear", "post-training, smooth", "post-training, free", "post-training, ste", "tokenizer, late")
# What the CPU waits for in a step (of two micro-batches), and how often.
LOOP = ("number", "training/loop.py:update")
"""Whether loss and gradient are finite, and whether the weights are that the step made."""
REWARDS = ("number", "training/own_rewards.py:check_finite")
"""Whether the rewards are, once for each time that they are measured."""
SAMPLING = ("number", "sampling/sample.py:sample_tokens")
"""Whether all logits of a free rollout were finite."""
REVIVAL = ("nonzero", "training/objectives/reconstruction.py:_revive")
"""Which codes are dead."""


def waits_of(config) -> dict[tuple[str, str], int]:
    if isinstance(config, PolicyConfig):
        free, updates = config.rollout == "free", config.inner_epochs
        once = free or updates > 1 or config.estimator == "reinforce"  # else measured in every micro-batch
        return {LOOP: 2 * updates, REWARDS: 1 if once else 2} | ({SAMPLING: 1} if free else {})
    return {LOOP: 2} | ({REVIVAL: 1} if getattr(config, "revive_after", 0) else {})


@pytest.fixture
def batch(rng) -> EncodedBatch:
    images = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    tokens = torch.randint(32, (4, 16), generator=rng)
    return EncodedBatch(images, torch.arange(4) % 3, tokens=tokens)


@pytest.fixture
def build(tokenizer_folder, tiny_generator, batch):
    """The objective and its trainee, in training, for a configuration and a device."""

    def build(config, device, dtype=None):
        tokenizer, world = load_tokenizer(tokenizer_folder).to(device), World(0, 1, device)
        if config in RECONSTRUCTION_CASES.values():
            trainee = TokenizerTrainee(tokenizer.requires_grad_(True), discriminator=config.discriminator_weight > 0)
            return Reconstruction(config, total_steps=10, seed=3, world=world), trainee.to(device).train()
        if config in CONSISTENCY_CASES.values():
            trainee = Trainee(tiny_generator(), config.head_specs(2, tokenizer.code_dim))
            trainee.reset_heads(seeded(0, "heads"))
            return Autoregressive(config, tokenizer, total_steps=10, seed=3), trainee.to(device).train()
        settings = {"autocast_dtype": dtype}
        if isinstance(config, PolicyConfig) and config.smooth_credit:
            settings["probe"] = lambda: batch.images.to(device)
        prior = tiny_generator(seed=1).requires_grad_(False).to(device)
        objective = method_of_config(config).objective(
            config, tokenizer, prior, total_steps=10, seed=3, world=world, **settings
        )
        return objective, AlignmentTrainee(tiny_generator()).to(device).train()

    return build


@pytest.fixture
def steps(build, batch, make_config, tmp_path, cuda):
    """Losses of two steps as the loop takes them, in two micro-batches; what the second waited for; a validation."""

    def steps(config, device, dtype=None):
        torch.manual_seed(0)
        objective, trainee = build(config, device, dtype)
        settings, losses = make_config(loop={"accumulation": 2, "ema_decay": 0.9}), []
        average = {key: value.clone() for key, value in trainee.state_dict().items()}
        state = State(trainee, build_optimizer(trainee, settings.optim), average, device=device)
        aligns = isinstance(trainee, AlignmentTrainee)
        data = ImageBatch(batch.images, batch.condition) if aligns else batch
        for step in (1, 2):
            cuda.clear()
            moved = to_device(data, device)
            state.step = step
            prepared = objective.prepare(trainee, moved, step)
            for _ in range(config.updates):
                terms = update(trainee, state, objective, prepared, settings, ALONE, dtype, tmp_path)
                losses.append(terms["loss"])
        waits = dict(cuda.waits)
        with torch.inference_mode():
            measured = objective.validate(trainee.eval(), iter([to_device(data, device)]))
        return [float(loss) for loss in losses], waits, measured

    return steps


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_a_step_has_the_losses_of_the_cpu_and_waits_for_what_is_named(name, steps) -> None:
    config = CASES_BY_NAME[name]
    losses, waits, measured = steps(config, CUDA)
    assert waits == waits_of(config)
    expected, _, known = steps(config, CPU)
    if not isinstance(config, StraightThroughConfig):  # its noise is drawn on the device, where numbers are others
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert measured == pytest.approx(known, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", IN_BF16)
def test_steps_in_bf16(name, steps) -> None:
    config = CASES_BY_NAME[name]
    losses, waits, _ = steps(config, CUDA, torch.bfloat16)
    assert waits == waits_of(config) and torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(guidance_scale=2.0, guidance_schedule="power_cosine"),
        SamplerConfig(top_k=5, top_p=0.9),
        SamplerConfig(temperature=0.0),
    ],
)
def test_no_token_is_waited_for(cuda, sampler, tiny_generator) -> None:
    model, condition = tiny_generator().to(CUDA), torch.arange(3).to(CUDA)
    sample_tokens(model, condition, range(3), sampler)
    counts = []
    for length in (4, 16):
        cuda.clear()
        sample_tokens(model, condition, range(3), sampler, num_tokens=length)
        counts.append((dict(cuda.waits), dict(cuda.copies)))
    assert counts[0] == counts[1] == ({SAMPLING: 1}, {("to the device", "records.py:<lambda>"): 1})
