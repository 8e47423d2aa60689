"""What every post-training objective keeps: terms that sum to the loss, a frozen tokenizer, one pass per image."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from conftest import TINY_VQ, stir
from contracts.test_generators import make_generator
from rounding import assert_rounding
from torch.utils._python_dispatch import TorchDispatchMode

from consonar import records
from consonar.distributed import World
from consonar.errors import UserError
from consonar.records import split
from consonar.seeding import draw_weights
from consonar.seeding import generator as seeded
from consonar.training import losses
from consonar.training import policy_gradient as policy
from consonar.training.objectives import METHODS, method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee, GuardConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import (
    CrossEntropyConfig,
    StraightThroughConfig,
)
from consonar.training.objectives.free import FreeRollout
from consonar.training.objectives.policy import PolicyConfig, TeacherForcedPolicy
from consonar.types import ImageBatch, PromptCondition, TextCondition

REWARDS = {"mse": 1.0, "l1": 0.5}
VAPI = PolicyConfig(rewards=REWARDS, group_size=3)
SUMMANDS = 2000  # on the way to a gradient: the layers there and back, and the mean over 4 x 16 tokens
CASES = {
    "vapi": VAPI,
    "noise": replace(VAPI, context_noise=0.5),
    "kl": replace(VAPI, kl_weight=0.3),
    "exact kl": replace(VAPI, kl_weight=0.3, kl="exact", temperature=0.8),
    "no prior": replace(VAPI, ce_weight=0.0),
    "rloo": replace(VAPI, estimator="rloo"),
    "dr_grpo": replace(VAPI, estimator="dr_grpo"),
    "gspo": replace(VAPI, estimator="gspo"),
    "dapo": replace(VAPI, estimator="dapo"),
    "reinforce": replace(VAPI, estimator="reinforce", group_size=1),
    "tokens": replace(VAPI, credit="token"),
    "smooth": replace(VAPI, credit="token", smooth_credit=True),
    "reinforce tokens": replace(VAPI, estimator="reinforce", credit="token"),
    "epochs": replace(VAPI, inner_epochs=2),
    "position": replace(VAPI, entropy="position", entropy_weight=0.7),
    "mean": replace(VAPI, entropy="mean", context_noise=0.5, corruption="drawn", embedding_weight=0.5),
    "held cold": replace(VAPI, entropy="position", temperature=0.8, credit="token", smooth_credit=True, kl_weight=0.1),
    "held free": replace(VAPI, entropy="position", rollout="free", ce_weight=0.0),
    "free": replace(VAPI, rollout="free", guidance_scale=2.0, kl_weight=0.1, ce_weight=0.0),
    "free epochs": replace(VAPI, rollout="free", inner_epochs=2, ce_weight=0.0),
    "ce": CrossEntropyConfig(rewards=REWARDS, context_noise=0.3),
    "soft": CrossEntropyConfig(rewards=REWARDS, target="soft", tau=0.5),
    "sar": CrossEntropyConfig(rewards=REWARDS, context_noise=0.8, corruption="drawn", noise_schedule="linear"),
    "ste": StraightThroughConfig(rewards=REWARDS, perceptual_weight=0.0),
}
CAPTIONED = ("kl", "mean", "free", "free epochs", "soft", "sar", "ste")
"""Of every method one under captions at least, by every kind of generator that reads some."""
TEXTS = ("rear, text", "llamagen, text", "janus")
CAPTION_CASES = [
    *((name, "rear, text") for name in CAPTIONED),
    *((name, "llamagen, text") for name in ("free", "sar")),
    *((name, "janus") for name in ("free", "ste")),
]
WORLD = World(0, 1, torch.device("cpu"))
HEADS = AutoregressiveConfig(embedding_weight=0.5, head_width=16).head_specs(2, TINY_VQ.code_dim)
"""Of the reAR run that `embedding_weight` goes on from."""


@pytest.fixture
def kind(request):
    """What the generator is conditioned on: classes, or captions, by a name of `TEXTS`."""
    return getattr(request, "param", "classes")


@pytest.fixture
def batch(rng, kind):
    images = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    if kind == "classes":
        return ImageBatch(images, torch.arange(4) % 3)
    mask = torch.arange(4) >= torch.tensor([[0], [2], [1], [0]])
    words = PromptCondition(torch.randint(4, 20, (4, 4), generator=rng).where(mask, 1), mask)
    return ImageBatch(images, words if kind == "janus" else TextCondition(torch.randn(4, 4, 6, generator=rng), mask))


@pytest.fixture
def make(tokenizer, tiny_generator, batch, kind):
    if kind == "classes":
        start, prior = tiny_generator(dropout=0.2), tiny_generator(seed=1)
    else:
        start, prior = make_generator(kind), make_generator(kind)
        stir(prior, seeded(1, kind))
    prior.requires_grad_(False)

    def make(config, **settings):
        if isinstance(config, PolicyConfig) and config.smooth_credit:
            settings["probe"] = lambda: batch.images
        objective = method_of_config(config).objective(
            config, tokenizer, prior, total_steps=10, seed=3, world=WORLD, **settings
        )
        trainee = AlignmentTrainee(copy.deepcopy(start), HEADS if config.keeps_heads else ())
        draw_weights(trainee.heads, rng=seeded(0, "heads"))
        return objective, trainee

    return make


def test_every_objective_has_a_case():
    methods = {method.name for method in METHODS if method.run == "post-training"}
    assert {method_of_config(config).name for config in CASES.values()} == methods
    assert {method_of_config(CASES[name]).name for name in CAPTIONED} == methods - {"cross-entropy"}
    estimators = {config.estimator for config in CASES.values() if isinstance(config, PolicyConfig)}
    assert estimators == set(get_args(policy.Estimator))


def test_a_decoder_without_a_gradient_is_refused_by_what_needs_one(make, batch, tokenizer, monkeypatch):
    decode = tokenizer.decode_embeddings
    objective, trainee = make(CASES["ste"])
    prepared = objective.prepare(trainee, batch, 0)
    objective.loss(trainee, prepared, 0)
    monkeypatch.setattr(tokenizer, "decode_embeddings", lambda codes: decode(codes.detach()))
    with pytest.raises(UserError, match="the pixel loss has no gradient: decode_embeddings of the tokenizer cuts it"):
        objective.loss(trainee, prepared, 0)


def weighted_terms(config, terms):
    """The loss as the sum of its named terms."""
    if isinstance(config, PolicyConfig):
        weights = {"cross_entropy": config.ce_weight, "kl": config.kl_weight, "entropy_penalty": config.entropy_weight}
        weights |= dict.fromkeys(("align_current", "align_next"), config.embedding_weight)
        return terms["policy"] + sum(weight * terms[key] for key, weight in weights.items() if key in terms)
    if isinstance(config, CrossEntropyConfig):
        return terms["soft_cross_entropy" if config.target == "soft" else "cross_entropy"]
    return config.mse_weight * terms["mse"] + config.ce_weight * terms["cross_entropy"]


@pytest.mark.parametrize(("name", "kind"), [*((name, "classes") for name in CASES), *CAPTION_CASES], indirect=["kind"])
def test_terms_sum_to_the_loss_and_only_the_generator_learns(name, make, batch, tokenizer):
    objective, trainee = make(CASES[name])
    trainee.train()
    rollout = objective.prepare(trainee, batch, 0)
    for _ in range(CASES[name].updates):
        assert torch.equal(rollout.batch.tokens, tokenizer.encode(batch.images))
        loss, terms = objective.loss(trainee, rollout, 0)
        assert loss.isfinite() and loss.ndim == 0
        torch.testing.assert_close(loss, weighted_terms(CASES[name], terms))
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parameters())
    assert any(p.grad.abs().sum() > 0 for p in trainee.parameters())
    assert all(p.grad is None for p in tokenizer.parameters())
    assert all(p.grad is None for p in objective.prior.parameters())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "classes") for name in CASES), *((name, "rear, text") for name in ("mean", "free", "ste"))],
    indirect=["kind"],
)
def test_micro_batches_have_the_loss_of_the_whole(name, make, batch):
    """Draws and noise are prepared for the whole batch: splitting it changes nothing."""
    gradients, baselines = [], []
    for parts in (1, 2):
        objective, trainee = make(CASES[name])
        rollout = objective.prepare(trainee, batch, 4)
        for part in split(rollout, parts):
            (objective.loss(trainee, part, 4)[0] / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainee.parameters()]))
        baselines.append(trainee.reward_baseline)
    assert_rounding(gradients[1], gradients[0], SUMMANDS)
    assert_rounding(*baselines, SUMMANDS)


def first_changed(condition):
    """The captions with other words inside the first one."""
    if isinstance(condition, PromptCondition):
        tokens = condition.tokens.clone()
        tokens[0, 1:-1] = 23 - tokens[0, 1:-1]
        return replace(condition, tokens=tokens)
    features = condition.features.clone()
    features[0, 1:-1] *= -1
    return replace(condition, features=features)


@pytest.mark.parametrize(("name", "kind"), CAPTION_CASES, indirect=["kind"])
def test_a_caption_decides_what_its_own_picture_teaches_and_dropped_it_says_nothing(name, kind, make, batch):
    other = replace(batch, condition=first_changed(batch.condition))

    def by_row(config, given):
        objective, trainee = make(config)
        prepared = objective.prepare(trainee, given, 0)
        terms = [objective.loss(trainee, part, 0)[1].values() for part in split(prepared, 4)]
        drawn = prepared.drawn.actions if isinstance(prepared, FreeRollout) else prepared.context
        return torch.tensor([[float(term.detach()) for term in of_row] for of_row in terms]), drawn.flatten(1)

    (before, drawn), (after, drawn_after) = by_row(CASES[name], batch), by_row(CASES[name], other)
    assert not torch.isclose(after[0], before[0]).all()
    assert_rounding(after[1:], before[1:], SUMMANDS)
    draws = name in ("mean", "free", "free epochs", "sar")
    assert (drawn_after != drawn).any(1).tolist() == [draws, False, False, False]
    dropped = replace(CASES[name], class_dropout=1.0)
    (before, drawn), (after, drawn_after) = by_row(dropped, batch), by_row(dropped, other)
    assert_rounding(after, before, SUMMANDS)
    assert torch.equal(drawn_after, drawn)


@pytest.mark.parametrize("name", ["vapi", "noise", "kl", "exact kl", "gspo", "tokens", "smooth"])
def test_shared_context_equals_one_pass_for_each_sample(name, make, batch):
    """The released form repeats the whole generator for each of the G samples; the gradient is the same."""
    config = CASES[name]
    objective, trainee = make(config)
    rollout = objective.prepare(trainee, batch, 2)
    ours, _ = objective.loss(trainee, rollout, 2)
    ours.backward()
    shared = torch.cat([p.grad.flatten() for p in trainee.parameters()])
    trainee.zero_grad()

    group = config.group_size
    rows = torch.arange(4).repeat_interleave(group)
    with torch.no_grad():
        seen = objective.look(trainee(rollout.context, rollout.condition).logits, rollout)
        drawn = objective.reward(trainee, seen.drawn, rollout.batch)
        prior = objective.prior(rollout.context[rows], rollout.condition[rows])[0]
    actions = drawn.actions.flatten(0, 1)[:, None]  # (B * G, 1, N)
    logits = trainee(rollout.context[rows], rollout.condition[rows]).logits  # (B * G, N, V)
    log_probs = policy.token_log_probs(logits, actions, config.temperature)
    ratio = policy.probability_ratio(log_probs, log_probs.detach(), whole_sequence=config.estimator == "gspo")
    advantages = drawn.advantages.flatten(0, 1)[:, None]
    loss = policy.clipped_policy_loss(ratio, advantages, config.clip_range, config.clip_high).mean()
    loss = loss + config.ce_weight * losses.next_token_loss(logits, rollout.batch.tokens[rows])
    if config.kl == "exact":
        divergence = policy.kl_exact(logits, prior, config.temperature).mean()
    else:
        divergence = policy.kl_k3(log_probs, policy.token_log_probs(prior, actions, config.temperature)).mean()
    loss = loss + config.kl_weight * divergence
    loss.backward()
    repeated = torch.cat([p.grad.flatten() for p in trainee.parameters()])
    assert_rounding(ours, loss, SUMMANDS)
    assert_rounding(shared, repeated, SUMMANDS)


class LikeLogits(TorchDispatchMode):
    """How many new tensors have as many numbers as the logits, with the codes innermost."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        is_new = not any(returned.alias_info for returned in func._schema.returns)
        if is_new and isinstance(result, torch.Tensor) and result.numel() == self.numbers and result.shape[-1] == 32:
            self.count += 1
        return result


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["vapi", "epochs", "tokens", "gspo", "kl", "exact kl", "free", "position", "held free"]
)
def test_draws_loss_and_entropy_make_nothing_like_the_logits_but_their_gradient(name, dtype, make, batch, monkeypatch):
    """However many rows: what they share of one pass is made of 5 rows at a time, and so is the gradient."""
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", 5 * 32)
    objective, trainee = make(CASES[name], autocast_dtype=dtype)
    prepared = objective.prepare(trainee, batch, 0)
    context, condition = prepared.context, prepared.condition
    if CASES[name].rollout == "free":
        context, condition = prepared.drawn.actions.flatten(0, 1), records.repeat(condition, VAPI.group_size)
    numbers = context.numel() * 32

    def counted(function):
        with LikeLogits(numbers) as seen, objective.autocast():
            result = function()
        return result, seen.count

    logits, own = counted(lambda: trainee(context, condition).logits)
    gradient = torch.ones_like(logits)
    _, own_back = counted(lambda: logits.backward(gradient))
    _, of_prior = counted(lambda: objective.prior_logits(context, condition)) if CASES[name].asks_prior else (None, 0)
    (loss, _), made = counted(lambda: objective.loss(trainee, prepared, 0))
    _, back = counted(lambda: loss.backward())
    assert made == own + of_prior
    # The gradients of cross-entropy and of the exact KL arrive by roads of their own where the temperature is not 1.
    assert back == own_back + (5 if name == "exact kl" else 1)


@pytest.mark.parametrize("group", [2, 16])
def test_one_pass_of_the_generator_whatever_the_group(group, make, batch):
    """One forward with gradient and none without; the start model runs only when its KL is wanted."""
    objective, trainee = make(replace(VAPI, group_size=group))
    calls = {"policy": 0, "prior": 0}
    for key, module in (("policy", trainee.generator), ("prior", objective.prior)):
        module.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls[key] + 1))
    objective.loss(trainee, objective.prepare(trainee, batch, 0), 0)[0].backward()
    assert calls == {"policy": 1, "prior": 0}


def test_with_one_epoch_the_ratio_is_one_and_with_more_it_moves(make, batch):
    objective, trainee = make(replace(VAPI, inner_epochs=3, clip_range=1e-4))
    optimizer = torch.optim.SGD(trainee.parameters(), lr=0.1)
    deviations, clipped = [], []
    rollout = objective.prepare(trainee, batch, 0)
    for _ in range(3):
        loss, terms = objective.loss(trainee, rollout, 0)
        deviations.append(float(terms["ratio_deviation"]))
        clipped.append(float(terms["clip_fraction"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert deviations[0] == 0 and deviations[1] > 1e-4
    assert clipped[0] == 0 and min(clipped[1:]) > 0.05
    objective, trainee = make(VAPI)
    rollout = objective.prepare(trainee.train(), batch, 0)
    terms = objective.loss(trainee, rollout, 0)[1]
    assert terms["ratio_deviation"] == 0 and terms["clip_fraction"] == 0


@pytest.mark.parametrize("rollout", ["teacher_forced", "free"])
def test_the_first_of_several_updates_has_a_ratio_of_one_in_bf16(rollout, make, batch):
    """Also in micro-batches, where the pass that drew rounds otherwise; the second update sees the same numbers."""
    config = replace(VAPI, rollout=rollout, inner_epochs=2, ce_weight=0.0)
    objective, trainee = make(config, autocast_dtype=torch.bfloat16)
    prepared = objective.prepare(trainee, batch, 0)
    olds = []
    for update in range(2):
        for part in split(prepared, 2):
            with torch.autocast("cpu", torch.bfloat16):
                loss, terms = objective.loss(trainee, part, update)
            loss.backward()
            assert (terms["ratio_deviation"] == 0) == (update == 0)
        olds.append(prepared.drawn.old_log_probs.clone())
        with torch.no_grad():
            for parameter in trainee.parameters():
                parameter.add_(0.01)
    assert torch.equal(*olds) and olds[0].isfinite().all()


def test_dropout_stays_off(make, batch):
    _, trainee = make(VAPI)
    trainee.train()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    first, second = (trainee(tokens, torch.tensor([0, 1])).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not any(module.training for module in trainee.modules())


def test_the_reward_rises_under_the_policy_gradient(make, batch):
    """A hundred steps on one batch: the mean reward of the draws goes up by more than its own spread."""
    objective, trainee = make(replace(VAPI, group_size=8, ce_weight=0.0))
    optimizer = torch.optim.Adam(trainee.parameters(), lr=2e-3)
    rewards = []
    for step in range(60):
        rollout = objective.prepare(trainee, batch, step)
        loss, terms = objective.loss(trainee, rollout, step)
        rewards.append(float(terms["reward"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, last = torch.tensor(rewards[:10]), torch.tensor(rewards[-10:])
    assert last.mean() > first.mean() + 2 * first.std()


def test_the_running_baseline_of_reinforce(make, batch):
    objective, trainee = make(replace(CASES["reinforce"], baseline_decay=0.75))
    seen = []
    for step in range(3):
        rollout = objective.prepare(trainee, batch, step)
        terms = objective.loss(trainee, rollout, step)[1]
        seen.append(float(terms["reward"]))
        assert not any(key.startswith("reward_ties_") for key in terms)  # one draw of an image ties with no other
    expected = seen[0]
    for reward in seen:
        expected = 0.75 * expected + 0.25 * reward
    torch.testing.assert_close(trainee.reward_baseline[0], torch.tensor(expected))


def test_the_baseline_of_reinforce_moves_once_per_step_whatever_the_micro_batches(make, batch):
    moved = []
    for parts in (1, 2, 4):
        objective, trainee = make(replace(CASES["reinforce"], baseline_decay=0.75))
        for step in range(2):
            rollout = objective.prepare(trainee, batch, step)
            for part in split(rollout, parts):
                _, terms = objective.loss(trainee, part, step)
                assert terms["ratio_deviation"] == 0
        assert trainee.num_baseline_updates == 2
        moved.append(trainee.reward_baseline)
    assert_rounding(moved[1], moved[0], SUMMANDS)
    assert_rounding(moved[2], moved[0], SUMMANDS)


def test_groups_without_spread_are_logged(make, batch):
    """A certain policy draws the same sequence every time: all groups are ties."""
    objective, trainee = make(replace(VAPI, credit="token"))
    rollout = objective.prepare(trainee, batch, 0)
    _, terms = objective.loss(trainee, rollout, 0)
    assert 0 <= terms["reward_ties"] < 1 and terms["reward_spread"] > 0
    with torch.no_grad():
        trainee.generator.lm_head.bias[3] = 1e4
    rollout = objective.prepare(trainee, batch, 0)
    _, terms = objective.loss(trainee, rollout, 0)
    assert terms["reward_ties"] == 1 and terms["reward_spread"] == 0 and terms["policy"] == 0


CANCELLING = ("test_alignment:high_reward", "test_alignment:low_reward")


def high_reward(images, originals, batch):
    return 1000 + 1e-4 * torch.arange(len(images)) % 3e-4


def low_reward(images, originals, batch):
    return torch.full((len(images),), -1000.0)


def test_the_rounding_of_rewards_that_cancel_gives_no_credit(make, batch):
    objective, trainee = make(replace(VAPI, rewards=dict.fromkeys(CANCELLING, 1.0)))
    rollout = objective.prepare(trainee, batch, 0)
    _, terms = objective.loss(trainee, rollout, 0)
    assert terms["reward_ties"] == 1 and terms["policy"] == 0 and terms["reward"].abs() < 1


def uneven_reward(images, originals, batch):
    return 1e-3 + 1e-8 * torch.arange(len(images))


def test_equal_draws_get_equal_rewards_however_these_are_rounded(make, batch):
    objective, trainee = make(replace(VAPI, rewards={"test_alignment:uneven_reward": 1.0}))
    with torch.no_grad():
        trainee.generator.lm_head.bias[3] = 1e4
    rollout = objective.prepare(trainee, batch, 0)
    _, terms = objective.loss(trainee, rollout, 0)
    assert terms["reward_ties"] == 1 and terms["policy"] == 0


def test_free_rollouts_are_samples_of_the_policy(make, batch):
    objective, trainee = make(replace(VAPI, rollout="free", group_size=2, ce_weight=0.0))
    rollout = objective.prepare(trainee, batch, 0)
    actions = rollout.drawn.actions
    assert actions.shape == (4, 2, 16) and not torch.equal(actions[:, 0], actions[:, 1])
    again = objective.prepare(trainee, batch, 0)
    assert torch.equal(actions, again.drawn.actions)
    other = objective.prepare(trainee, batch, 1)
    assert not torch.equal(actions, other.drawn.actions)


def test_pictures_too_small_for_the_perceptual_distance_are_refused(make):
    with pytest.raises(UserError, match=r"perceptual_weight: efficientnet-lite0 reads images of 32 px.*set it to 0"):
        make(StraightThroughConfig(rewards=REWARDS, perceptual="efficientnet-lite0"))


def test_straight_through_has_hard_values_and_soft_gradient(rng):
    from consonar.training.objectives.controls import straight_through

    logits = torch.randn(2, 3, 5, generator=rng, requires_grad=True)
    chosen = straight_through(logits, 0.7)
    torch.testing.assert_close(chosen.sum(-1), torch.ones(2, 3))
    assert torch.equal(chosen.argmax(-1), logits.argmax(-1)) and chosen.max(-1).values.allclose(torch.ones(2, 3))
    weights = torch.randn(5, generator=rng)
    (ours,) = torch.autograd.grad((chosen * weights).sum(), logits)
    (soft,) = torch.autograd.grad(((logits / 0.7).softmax(-1) * weights).sum(), logits)
    torch.testing.assert_close(ours, soft)


def test_straight_through_gradient_reaches_the_generator_through_the_decoder(make, batch):
    objective, trainee = make(replace(CASES["ste"], ce_weight=0.0))
    rollout = objective.prepare(trainee, batch, 0)
    objective.loss(trainee, rollout, 0)[0].backward()
    assert trainee.generator.lm_head.weight.grad.abs().sum() > 0


def test_class_dropout_reaches_draw_and_update_alike(make, batch):
    objective, trainee = make(replace(VAPI, class_dropout=1.0))
    rollout = objective.prepare(trainee, batch, 0)
    assert torch.equal(rollout.condition, trainee.generator.null_condition(batch.condition))
    assert records.num_rows(rollout.condition) == 4


@pytest.mark.parametrize("kind", ["classes", *TEXTS], indirect=True)
def test_validation_is_of_the_true_context_and_the_same_for_all(kind, make, batch):
    """The start model against itself has KL 0; every objective measures the same numbers."""
    measured = {}
    for name in ("vapi", "ce", "ste"):
        objective, trainee = make(CASES[name])
        measured[name] = objective.validate(trainee, iter([batch, batch]))
    assert measured["vapi"] == measured["ce"] == measured["ste"]
    assert measured["vapi"]["kl"] > 0
    assert {"cross_entropy", "entropy", "accuracy", "reward", "reward_mse", "reward_l1"} < set(measured["vapi"])
    objective, trainee = make(VAPI)
    objective.prior = trainee.generator
    assert objective.validate(trainee, iter([batch]))["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["position", "held cold", "held free"])
def test_entropy_is_held_at_the_start_models_in_the_same_context(name, make, batch):
    """At the start model itself the penalty is 0 and moves nothing; away from it, it leads back."""
    objective, trainee = make(replace(CASES[name], kl_weight=0.0))
    rollout = objective.prepare(trainee, batch, 0)
    objective.prior = copy.deepcopy(trainee.generator).requires_grad_(False)
    _, terms = objective.loss(trainee, rollout, 0)
    assert terms["entropy_penalty"] == terms["entropy_deviation"] == 0 and terms["entropy"] == terms["entropy_start"]
    with torch.no_grad():
        trainee.generator.lm_head.weight *= 1.5
    optimizer, deviations = torch.optim.Adam(trainee.parameters(), lr=1e-3), []
    for _ in range(8):
        _, terms = objective.loss(trainee, rollout, 0)
        deviations.append(terms["entropy_deviation"])
        optimizer.zero_grad()
        terms["entropy_penalty"].backward()
        optimizer.step()
    assert deviations[-1] < 0.8 * deviations[0]


def test_a_drawn_context_is_of_the_model_under_the_true_one(make, batch):
    """Each token drawn after true tokens alone: of a certain model its choice, whatever was drawn before it."""
    objective, trainee = make(replace(CASES["sar"], context_noise=1.0, noise_schedule="constant"))
    first, again, other = (objective.prepare(trainee, batch, step) for step in (0, 0, 1))
    assert torch.equal(first.context, again.context) and not torch.equal(first.context, other.context)
    assert torch.equal(first.batch.tokens, objective.encode(batch).tokens)
    with torch.no_grad():
        trainee.generator.lm_head.weight *= 1e4
        certain = trainee(first.batch.tokens, batch.condition).logits.argmax(-1)
    assert torch.equal(objective.prepare(trainee, batch, 0).context, certain)
    half, _ = make(replace(CASES["sar"], context_noise=0.5, noise_schedule="constant"))
    kept = (half.prepare(trainee, batch, 0).context == certain).float().mean()
    assert 0.2 < kept < 0.8


def test_the_guard_names_what_left_its_band():
    guard = GuardConfig(min_entropy=1.0, max_entropy=3.0, max_kl=0.5)
    assert guard.breach({"entropy": 2.0, "kl": 0.4, "loss": 9.0}) is None
    assert guard.breach({"loss": 1.0}) is None
    assert guard.breach({"entropy": 0.9}) == "entropy 0.9 is below objective.guard.min_entropy 1"
    assert guard.breach({"entropy": 3.5}) == "entropy 3.5 is above objective.guard.max_entropy 3"
    assert guard.breach({"kl": 0.75}) == "kl 0.75 is above objective.guard.max_kl 0.5"


MISTAKES = {
    "group of one": (lambda: PolicyConfig(group_size=1), "objective.group_size: 1, but grpo compares"),
    "no epochs": (lambda: PolicyConfig(inner_epochs=0), "objective.inner_epochs: 0"),
    "temperature": (lambda: PolicyConfig(temperature=0.0), "objective.temperature: 0.0"),
    "noise": (lambda: PolicyConfig(context_noise=1.5), r"objective.context_noise: 1.5 is not in \[0, 1\]"),
    "unknown reward": (lambda: PolicyConfig(rewards={"mze": 1.0}), "mze"),
    "no reward": (lambda: PolicyConfig(rewards={}), "objective.rewards: empty"),
    "smooth alone": (
        lambda: PolicyConfig(smooth_credit=True),
        "objective.smooth_credit: True is read only with objective.credit",
    ),
    "free by token": (lambda: PolicyConfig(rollout="free", credit="token"), "choices here: sequence"),
    "free noise": (lambda: PolicyConfig(rollout="free", context_noise=0.1), "objective.context_noise: 0.1, but free"),
    "free prior": (lambda: PolicyConfig(rollout="free"), "objective.ce_weight: 0.1, but free rollouts"),
    "guided forcing": (
        lambda: PolicyConfig(guidance_scale=2.0),
        "objective.guidance_scale: 2.0 is read only with objective.rollout",
    ),
    "entropy": (lambda: PolicyConfig(entropy="place"), "objective.entropy: unknown 'place'"),
    "weight of nothing": (
        lambda: PolicyConfig(entropy_weight=2.0),
        "objective.entropy_weight: 2.0 is read only with objective.entropy 'mean' or 'position'",
    ),
    "nothing held": (lambda: PolicyConfig(entropy="mean", entropy_weight=0.0), "objective.entropy_weight: 0.0"),
    "free heads": (
        lambda: PolicyConfig(rollout="free", ce_weight=0.0, embedding_weight=1.0),
        "objective.embedding_weight: 1.0 is read only with objective.rollout 'teacher_forced'",
    ),
    "drawn from nothing": (
        lambda: CrossEntropyConfig(corruption="drawn"),
        "objective.corruption: 'drawn' is read only with objective.context_noise over 0",
    ),
    "empty band": (lambda: GuardConfig(min_entropy=3.0, max_entropy=2.0), "min_entropy: 3.0 is above objective.guard"),
    "kl unmeasured": (lambda: GuardConfig(max_kl=1.0, measure_kl=False), "objective.guard.measure_kl: False"),
    "tau": (lambda: CrossEntropyConfig(tau=0.0), "objective.tau: 0.0"),
    "gumbel": (lambda: StraightThroughConfig(gumbel_temperature=0.0), "objective.gumbel_temperature: 0.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name):
    build, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_token_credit_needs_tokens_with_a_place(tokenizer):
    tokenizer.grid = None
    with pytest.raises(UserError, match=r"objective.credit: 'token' needs tokens with a place; tiny-vq is a 1D"):
        TeacherForcedPolicy(CASES["tokens"], tokenizer, None, total_steps=1, seed=0, world=WORLD)


def bad_reward(images, originals, batch):
    return torch.full((len(images),), float("nan"))


def wide_reward(images, originals, batch):
    return images.mean((2, 3))


def huge_reward(images, originals, batch):
    return torch.full((len(images),), 1e38)


NONSENSE = [
    ("bad_reward", "returned nan"), ("wide_reward", "returned shape"), ("huge_reward", "'weighted sum': returned inf")
]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), NONSENSE)
def test_a_reward_that_returns_nonsense_is_one_line(name, message, make, batch):
    objective, trainee = make(replace(VAPI, rewards={f"test_alignment:{name}": 10.0}))
    rollout = objective.prepare(trainee, batch, 0)
    with pytest.raises(UserError, match=message):
        objective.loss(trainee, rollout, 0)
