"""Steps of every objective on the device: the losses of the CPU, and nothing waits that is not named here."""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_VQ, make_tiny_generator
from contracts.test_alignment import CASES, HEADS, VAPI
from contracts.test_objectives import CONSISTENCY, RECONSTRUCTION
from device.pretend import LOG, Log, PretendedStream
from torch import nn

from consonar.distributed import World, one_ahead_beside, side_stream
from consonar.records import to_device
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import draw_weights
from consonar.seeding import generator as seeded
from consonar.tokenizers.vq import VQTokenizer
from consonar.training.checkpoints import State
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.loop import Built, Running, update
from consonar.training.noise import NoiseConfig
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.base import ObjectiveConfig
from consonar.training.objectives.controls import StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.optim import OptimConfig, build_optimizer
from consonar.training.tracking import Tracker
from consonar.training.trainee import Trainee
from consonar.types import EncodedBatch, ImageBatch, Objective

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
IN_BF16 = ("consistency, rear", "post-training, smooth", "post-training, free", "post-training, ste", "tokenizer, late",
           "post-training, held cold")  # fmt: skip
RUN = TrainConfig(
    recipe="steps", tokenizer="tiny", optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_steps=2),
    loop=LoopConfig(steps=6, batch_size=4, accumulation=2, ema_decay=0.9),
)  # fmt: skip
# What the CPU waits for in a step (of two micro-batches), and how often.
LOOP = ("number", "training/loop.py:update")
"""Whether loss and gradient are finite."""
REWARDS = ("number", "training/rewards.py:check_finite")
"""Whether the rewards are, once for each time that they are measured."""
SAMPLING = ("number", "sampling/decoder.py:finish")
"""Whether all logits of a free rollout were finite."""
REVIVAL = ("nonzero", "training/objectives/reconstruction.py:_revive")
"""Which codes are dead."""

LAUNCHES = {"consistency": 800, "policy": 1750, "cross_entropy": 700, "straight_through": 1100, "reconstruction": 1750}
"""What the device is asked to do in one update of two micro-batches, of two layers, in float32: at most so much."""
COPIES = {"consistency": 7, "policy": 6, "cross_entropy": 5, "straight_through": 2, "reconstruction": 3}
"""To the device in a step: the batch and numbers drawn on the CPU, at most so many."""
CASTS = 1.35
"""How many times as much in bf16."""


def waits_of(config) -> dict[tuple[str, str], int]:
    if isinstance(config, PolicyConfig):
        free, updates = config.rollout == "free", config.inner_epochs
        once = free or updates > 1 or config.estimator == "reinforce"  # else measured in every micro-batch
        return {LOOP: updates, REWARDS: 1 if once else 2} | ({SAMPLING: 1} if free else {})
    return {LOOP: 1} | ({REVIVAL: 1} if getattr(config, "revive_after", 0) else {})


def make_batch() -> EncodedBatch:
    rng = seeded(0, "test")
    images = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    return EncodedBatch(images, torch.arange(4) % 3, tokens=torch.randint(32, (4, 16), generator=rng))


def build(config: ObjectiveConfig, device: torch.device, dtype: torch.dtype | None) -> tuple[Objective, nn.Module]:
    """The objective and its trainee, in training, for a configuration and a device."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TINY_VQ, name="tiny-vq").eval().requires_grad_(False).to(device)
    method, settings = method_of_config(config), {"total_steps": 10, "seed": 3, "world": World(0, 1, device)}
    if method.run == "tokenizer":
        trainee = TokenizerTrainee(tokenizer.requires_grad_(True), discriminator=config.has_discriminator)
        return method.objective(config, **settings), trainee.to(device).train()
    if method.run == "generator":
        trainee = Trainee(make_tiny_generator(), config.head_specs(2, tokenizer.code_dim))
        draw_weights(trainee.heads, rng=seeded(0, "heads"))
        return method.objective(config, tokenizer, **settings), trainee.to(device).train()
    prior = make_tiny_generator(seed=1).requires_grad_(False).to(device)
    settings |= {"autocast_dtype": dtype, "probe": lambda: make_batch().images.to(device)}
    trainee = AlignmentTrainee(make_tiny_generator(), HEADS if config.keeps_heads else ())
    draw_weights(trainee.heads, rng=seeded(0, "heads"))
    trainee.to(device).train()
    return method.objective(config, tokenizer, prior, **settings), trainee


def take_steps(
    config: ObjectiveConfig, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[list[dict[str, float]], Log, dict[str, float]]:
    """The terms of two steps as the loop takes them, in two micro-batches; the log of the second; a validation."""
    objective, trainee = build(config, device, dtype)
    average = {key: value.clone() for key, value in trainee.state_dict().items()}
    state = State(trainee, build_optimizer(trainee, RUN.optim), average)
    folder = Path("no run")
    tracker = Tracker(folder, RUN, enabled=False)
    run = Running(RUN, Built(trainee, objective, None), state, tracker, folder, World(0, 1, device))
    data, terms = make_batch(), []
    if isinstance(trainee, AlignmentTrainee):
        data = ImageBatch(data.images, data.condition)
    for step in (1, 2):
        LOG.clear()
        state.step = step
        prepared = objective.prepare(trainee, to_device(data, device), step)
        for _ in range(config.updates):
            terms.append(update(run, trainee, prepared, dtype))
    seen = copy.deepcopy(LOG)
    with torch.inference_mode():
        measured = objective.validate(trainee.eval(), iter([to_device(data, device)]))
    return [{key: float(value) for key, value in row.items()} for row in terms], seen, measured


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_a_step_has_the_terms_of_the_cpu_and_waits_for_what_is_named(name, cuda) -> None:
    config = CASES_BY_NAME[name]
    terms, seen, measured = take_steps(config, CUDA)
    assert seen.waits == waits_of(config)
    assert seen.copies.total() <= COPIES[config.kind]
    assert seen.launches.total() <= LAUNCHES[config.kind] * config.updates
    once = {"_fused_adamw_": 2, "_foreach_lerp_": 1, "lerp_": 0}  # whatever the number of weights; AdamW of each group
    assert {name: seen.launches[name] for name in once} == {k: count * config.updates for k, count in once.items()}
    expected, _, known = take_steps(config, CPU)
    if not isinstance(config, StraightThroughConfig):  # its noise is drawn on the device, where numbers are others
        for ours, theirs in zip(terms, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        assert measured == pytest.approx(known, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", IN_BF16)
def test_steps_in_bf16(name, cuda) -> None:
    config = CASES_BY_NAME[name]
    terms, seen, _ = take_steps(config, CUDA, torch.bfloat16)
    assert seen.waits == waits_of(config)
    assert seen.launches.total() <= CASTS * LAUNCHES[config.kind] * config.updates
    assert all(math.isfinite(value) for row in terms for value in row.values())


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
    copies = 2 if sampler.guidance_scale != 1 else 1  # numbers to draw by, scales
    assert counts[0] == counts[1] == ({SAMPLING: 1}, {("to the device", "records.py:<lambda>"): copies})


@pytest.mark.parametrize(("free", "chunk"), [(2**40, 12), (4 * 3 * 6 * 8192, 2), (1, 1)])
def test_pictures_are_judged_by_as_many_as_memory_holds(free, chunk, cuda, monkeypatch) -> None:
    """A quarter of what is free holds all, 3 or none of 12: powers of two of it at once, recorded, the same terms, and
    one wait for all."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**41))
    sizes, decode = [], VQTokenizer.decode
    monkeypatch.setattr(
        VQTokenizer, "decode", lambda model, tokens: (sizes.append(len(tokens)), decode(model, tokens))[1]
    )
    batch = to_device(make_batch(), CUDA)

    def taken(config: PolicyConfig) -> tuple[Objective, dict[str, float]]:
        objective, trainee = build(config, CUDA, torch.bfloat16)
        prepared = objective.prepare(trainee, ImageBatch(batch.images, batch.condition), 0)
        cuda.clear()
        with objective.autocast():
            terms = objective.loss(trainee, prepared, 0)[1]
        assert cuda.waits == {REWARDS: 1}
        return objective, {key: value.item() for key, value in terms.items()}

    objective, terms = taken(VAPI)
    assert sizes[0] == 1 and max(sizes[1:]) == chunk and sum(sizes[1:]) == 12
    assert min(objective.state(0)["chunk"], 12) == chunk
    assert terms == pytest.approx(taken(replace(VAPI, chunk=5))[1], rel=1e-4, abs=1e-4)


def test_a_chunk_is_decoded_beside_the_judging_of_the_one_before(cuda) -> None:
    """Which stands in no order with it, but begins when the one before that is judged; so two are in memory."""
    objective, trainee = build(replace(VAPI, chunk=3), CUDA, None)
    asked: dict[tuple[str, int], tuple[PretendedStream, Counter[PretendedStream]]] = {}
    pictures: list[weakref.ref] = []

    def decode(tokens: torch.Tensor, decode=objective.decode) -> torch.Tensor:
        assert sum(made() is not None for made in pictures) <= 1
        stream = torch.cuda.current_stream()
        asked["decode", len(pictures)] = stream, stream.ask()
        made = decode(tokens)
        pictures.append(weakref.ref(made))
        return made

    def judge(*given: object, judge=objective.rewards._chunk) -> object:
        stream = torch.cuda.current_stream()
        asked["judge", len(asked) - len(pictures)] = stream, stream.ask()
        return judge(*given)

    def first(one: tuple[str, int], other: tuple[str, int]) -> bool:
        stream, clock = asked[one]
        return asked[other][1][stream] >= clock[stream]

    objective.decode, objective.rewards._chunk = decode, judge
    batch = to_device(make_batch(), CUDA)
    objective.loss(trainee, objective.prepare(trainee, ImageBatch(batch.images, batch.condition), 0), 0)
    assert len(pictures) == 4 == len(asked) / 2
    for k in range(4):
        assert first(("decode", k), ("judge", k))
        if k < 3:
            assert not first(("decode", k + 1), ("judge", k)) and not first(("judge", k), ("decode", k + 1))
        if k < 2:
            assert first(("judge", k), ("decode", k + 2))


def test_what_another_stream_still_reads_is_not_given_away(cuda, monkeypatch) -> None:
    kept: list[tuple[torch.Tensor, object]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    parts, here = torch.arange(3, device=CUDA).split(1), torch.cuda.current_stream()
    made = list(one_ahead_beside(lambda part: part + 1, parts))
    wanted = [*((part, side_stream(CUDA)) for part in parts), *((one, here) for one in made)]
    assert len(kept) == 6 and all(any(a is tensor and b is stream for a, b in kept) for tensor, stream in wanted)


def test_on_a_cpu_chunks_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []
    parts = one_ahead_beside(lambda part: made.append(len(made)) or part, torch.arange(3).split(1))
    assert [len(made) for _ in parts] == [1, 2, 3]


def launched(function: Callable[..., object], *given: object) -> int:
    """How often the device was asked to do something."""
    LOG.clear()
    function(*given)
    return LOG.launches.total()


def own_launches(config: PolicyConfig, count: int) -> int:
    """Of the loss of `count` images, beside the models' passes, decoding and rewards."""
    objective, trainee = build(config, CUDA, None)
    batch = to_device(make_batch(), CUDA)
    prepared = objective.prepare(trainee, ImageBatch(batch.images[:count], batch.condition[:count]), 1)
    objective.loss(trainee, prepared, 1)  # in the first, memory is measured
    whole = launched(objective.loss, trainee, prepared, 1)
    whole -= launched(trainee, prepared.context, prepared.condition) * (2 if config.asks_prior else 1)
    whole -= launched(objective.decode, prepared.context)
    return whole - launched(objective.rewards.measure, objective.decode(prepared.context), prepared.batch)


MOST_LAUNCHES = {"vapi": 130, "position": 170, "kl": 145, "exact kl": 155, "tokens": 145, "smooth": 145}
"""Of draws, advantages, losses and what is logged."""


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_launches_of_a_loss_do_not_grow_with_draws_and_images(name, cuda) -> None:
    counts = {own_launches(replace(CASES[name], group_size=group), count) for group, count in ((3, 4), (12, 4), (3, 2))}
    assert len(counts) == 1 and max(counts) <= MOST_LAUNCHES[name]
