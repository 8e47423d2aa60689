"""Activation checkpointing: the same gradients from fewer tensors kept, for every kind of generator."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_VQ, make_tiny_generator
from contracts.test_generators import CONFIGS, KINDS, LENGTH, make_condition, make_generator
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from consonar.cpu.kernels import tune
from consonar.distributed import ALONE
from consonar.generators import GENERATORS
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.vqgan import MaskGITConfig
from consonar.training import run as runs
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.reconstruction import Reconstruction, ReconstructionConfig, TokenizerTrainee
from consonar.training.tracking import read_metrics
from consonar.types import ImageBatch

SMALL = {
    "image_size": 16,
    "vocab_size": 32,
    "code_dim": 4,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_groups": 4,
}
WITH_DISCRIMINATOR = ReconstructionConfig(perceptual_weight=0, discriminator_weight=0.1)
DROPOUT = {"token_dropout": 0.2, "attention_dropout": 0.2, "residual_dropout": 0.2, "ffn_dropout": 0.2}


def with_dropout(name: str):
    if name == "rear":
        return make_tiny_generator(dropout=0.2, num_layers=4)
    if name == "janus":  # has none
        return make_generator(name)
    kept = {"dropout": 0.2} if name.startswith("rear") else DROPOUT
    config = replace(CONFIGS[name], **kept, num_layers=4)
    model = tune(GENERATORS[config.kind].model(config))
    model.reset_parameters(seeded(0, name))
    head = model.lm_head if config.kind == "rear" else model.output
    torch.nn.init.normal_(head.weight, generator=seeded(1, name))  # zeros, and no gradient, before training
    return model


def gradients(model, tokens, condition) -> tuple[torch.Tensor, int]:
    """Those of `kept_for`, of a loss that reads logits and taps."""

    def loss():
        logits, taps = model(tokens, condition, tap_layers=(0, 1))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + sum(x.square().mean() for x in taps.values())

    return kept_for(model, loss)


def kept_for(model, make_loss) -> tuple[torch.Tensor, int]:
    """Gradients of a loss, in a row; and the bytes that were kept for it, without the weights."""
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(3)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make_loss()
    loss.backward()
    rows = [torch.zeros(1) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    return torch.cat(rows), sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_none_from_fewer_tensors(name, rng):
    model = with_dropout(name).train()
    condition, tokens = make_condition(model, rng), torch.randint(32, (3, LENGTH), generator=rng)
    expected, whole = gradients(model, tokens, condition)
    model.recompute_every = 2
    half, of_half = gradients(model, tokens, condition)
    model.recompute_every = 1
    full, of_full = gradients(model, tokens, condition)
    assert expected.any() and torch.equal(half, expected) and torch.equal(full, expected)
    assert of_full < of_half < whole and of_full < 0.4 * whole


@pytest.mark.parametrize("config", [TINY_VQ, MaskGITConfig(**SMALL)], ids=lambda config: config.kind)
def test_a_tokenizer_is_trained_alike_from_fewer_tensors(config, rng):
    """Of its residual blocks; codes are counted once, and a discriminator reads as often as ever."""
    images = torch.rand(4, 3, config.image_size, config.image_size, generator=rng) * 2 - 1

    def found(every):
        torch.manual_seed(0)
        tokenizer = TOKENIZERS[config.kind].model(config, name="tokenizer")
        trainee, read = TokenizerTrainee(tokenizer, discriminator=True, recompute_every=every), []
        trainee.steps_unused += 5
        trainee.discriminator.register_forward_hook(lambda *_: read.append(1))
        objective = Reconstruction(WITH_DISCRIMINATOR, total_steps=10, seed=0, world=ALONE)
        rows, kept = kept_for(trainee, lambda: objective.loss(trainee, ImageBatch(images, None), 1)[0])
        return torch.cat([rows, trainee.steps_unused]), kept, len(read)

    (expected, whole, read), (half, of_half, _), (full, of_full, read_in_full) = map(found, (0, 2, 1))
    assert expected.any() and torch.equal(half, expected) and torch.equal(full, expected)
    assert of_full < of_half < whole and of_full < 0.6 * whole and read == read_in_full


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_has_the_losses_of_one_that_keeps_all(compiled, make_config, tmp_path, monkeypatch):
    compile_part = runs.compile_for_training
    monkeypatch.setattr(runs, "compile_for_training", lambda part: compile_part(part, backend="aot_eager"))
    config = make_config(
        objective=AutoregressiveConfig(embedding_weight=1.0, head_width=16),
        loop={"steps": 3, "accumulation": 2, "compile": compiled},
    )
    losses = []
    for every in (0, 1):
        changed = replace(config, loop=replace(config.loop, activation_checkpointing=every))
        run = runs.train(changed, tmp_path / str(every), quiet=True)
        losses.append([line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-6)
