"""Adapters beside the products of a generator of every kind, and of a start model under every objective."""

import copy

import pytest
import torch
from contracts.test_alignment import CASES, WORLD
from contracts.test_checkpointing import gradients
from contracts.test_generators import KINDS, LENGTH, make_condition, make_generator
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounterWithBackend

from consonar.compiling import compile_for_training
from consonar.errors import UserError
from consonar.training.lora import LoRAConfig, StartModel, adapt, adapted, merged, moving
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.trainee import Trainee
from consonar.types import ImageBatch

pytest.importorskip("peft")
RANK_4 = LoRAConfig(rank=4, alpha=8.0)


def stir_adapters(model, rng):
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=rng)


@pytest.fixture
def made(rng):
    """A generator of a kind, a copy of it in a trainee with adapters that are not zero, and what both read."""

    def made(name, config=RANK_4):
        start = make_generator(name).eval()
        given = torch.randint(32, (3, LENGTH), generator=rng), make_condition(start, rng)
        adapt(generator := copy.deepcopy(start), config, seed=0)
        trainee = Trainee(generator)
        assert torch.equal(trainee(*given).logits, start(*given)[0])  # where training starts
        stir_adapters(trainee, rng)
        return start, trainee, given

    return made


@pytest.mark.parametrize("name", KINDS)
def test_only_adapters_are_trained_and_they_go_into_the_weights(name, made):
    start, trainee, given = made(name)
    trained = {key for key, weight in trainee.named_parameters() if weight.requires_grad}
    # Two matrices for each product of attention and MLP: nothing else moves, or is in a checkpoint.
    assert trained == set(moving(trainee)) and len(trained) == 2 * len(adapted(trainee))
    assert not any("adaLN" in key for key in trained) and len(adapted(trainee)) >= 4 * start.num_layers
    whole = merged(trainee)
    assert whole.generator.state_dict().keys() == start.state_dict().keys()
    logits = trainee(*given).logits
    assert (whole(*given).logits - logits).abs().max() < 1e-4 < 0.1 < (logits - start(*given)[0]).abs().max()
    own = {weight.data_ptr() for weight in trainee.parameters()}
    assert sum(weight.data_ptr() not in own for weight in whole.parameters()) == len(adapted(trainee))
    assert torch.equal(StartModel(trainee)(*given)[0], start(*given)[0])
    assert torch.equal(trainee(*given).logits, logits)


@pytest.mark.parametrize("name", KINDS)
def test_recomputed_blocks_have_the_same_gradients(name, made):
    _, trainee, (tokens, condition) = made(name)
    model = trainee.generator.train()
    expected, kept = gradients(model, tokens, condition)
    model.recompute_every = 1
    found, fewer = gradients(model, tokens, condition)
    assert expected.any() and torch.equal(found, expected) and fewer < kept


@pytest.mark.slow
def test_blocks_are_two_graphs_and_passes_of_the_start_model_add_none(made):
    """The first block alone reads what needs no gradient."""
    _, trainee, given = made("llamagen")
    expected, _ = gradients(trainee.generator, *given)
    reset()
    counter = CompileCounterWithBackend("aot_eager")
    for part in trainee.parts():
        compile_for_training(part, backend=counter)
    for _ in range(2):
        with torch.no_grad():
            StartModel(trainee)(*given)
            merged(trainee)(*given)
        found, _ = gradients(trainee.generator, *given)
    assert counter.frame_count == 2
    assert torch.allclose(found, expected, atol=1e-6)
    reset()


@pytest.mark.parametrize("name", CASES)
def test_every_objective_trains_adapters_against_a_start_model_that_is_in_them(name, tokenizer, tiny_generator, rng):
    config, images = CASES[name], torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    batch = ImageBatch(images, torch.arange(4) % 3)
    adapt(generator := tiny_generator(), RANK_4, seed=0)
    trainee = AlignmentTrainee(generator)
    stir_adapters(trainee, rng)
    settings = {"probe": lambda: images} if isinstance(config, PolicyConfig) and config.smooth_credit else {}

    def loss_with(prior):
        objective = method_of_config(config).objective(
            config, tokenizer, prior, total_steps=10, seed=3, world=WORLD, **settings
        )
        trainee.reward_baseline.zero_()
        trainee.num_baseline_updates.zero_()
        loss, _ = objective.loss(trainee, objective.prepare(trainee, batch, 0), 0)
        return loss

    loss = loss_with(StartModel(trainee))
    assert torch.equal(loss, loss_with(tiny_generator().requires_grad_(False)))
    loss.backward()
    for key, weight in trainee.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad == (".lora_" in key), key
    assert all(weight.grad.any() for key, weight in trainee.named_parameters() if ".lora_" in key)


def test_targets_are_layers_of_a_block_by_name(tiny_generator):
    adapt(model := tiny_generator(), LoRAConfig(rank=2, targets=("qkv", "adaLN_modulation.1")), seed=0)
    assert {name.partition(".")[2] for name in adapted(model.blocks)} == {"attn.qkv", "adaLN_modulation.1"}
    other = tiny_generator()
    adapt(other, LoRAConfig(rank=2, targets=("qkv", "adaLN_modulation.1")), seed=1)
    key = "blocks.0.attn.qkv.lora_A.default.weight"
    assert not torch.equal(model.state_dict()[key], other.state_dict()[key])  # drawn from the seed
    for target in ("kv", "lm_head", ""):
        with pytest.raises(UserError, match=rf"lora\.targets: unknown '{target}'.*; choices: attn\.qkv, attn\.proj"):
            adapt(tiny_generator(), LoRAConfig(rank=2, targets=(target,)), seed=0)


def test_a_rank_above_a_width_is_refused(tiny_generator):
    """Of the narrowest layer that gets adapters: the generator is 32 wide, its MLP 128."""
    adapt(tiny_generator(), LoRAConfig(rank=32), seed=0)
    with pytest.raises(UserError, match=r"^lora\.rank: 33 is above the width of attn\.\w+, .*; at most 32$"):
        adapt(tiny_generator(), LoRAConfig(rank=33), seed=0)
