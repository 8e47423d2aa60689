import math

import pytest
import torch
from torch import nn

from consonar.errors import UserError
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.optim import OptimConfig, learning_rate, parameter_groups, update_average
from consonar.training.trainee import HeadSpec, Trainee

CONFIG = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)


def test_learning_rate():
    total = 15  # warm-up 0..3, cosine over 4..14
    values = [learning_rate(step, total, CONFIG) for step in range(total)]
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert values[9] == pytest.approx(0.55)  # half way of the cosine
    assert values[14] == pytest.approx(0.1)
    assert values[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 10)) / 2)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_learning_rate_without_warmup_or_in_a_short_run():
    assert learning_rate(0, 1, OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0)) == 1
    assert learning_rate(2, 3, CONFIG) == pytest.approx(0.75)  # a run shorter than its warm-up


def trainees(tokenizer):
    generator = ReARGenerator(
        ReARConfig(width=32, num_layers=2, num_heads=4, vocab_size=8, num_tokens=4, num_classes=2)
    )
    yield Trainee(generator, (HeadSpec("next", 1, "next", 4, 3, 16),))
    yield TokenizerTrainee(tokenizer.requires_grad_(True), discriminator=True)


def test_every_parameter_is_in_one_group_and_only_layer_weights_decay(tokenizer):
    for trainee in trainees(tokenizer):
        decayed, plain = parameter_groups(trainee, 0.03)
        assert decayed["weight_decay"] == 0.03 and plain["weight_decay"] == 0
        ids = [id(p) for group in (decayed, plain) for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in trainee.parameters())
        layers = {f"{n}.weight" for n, m in trainee.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        names = {id(p): name for name, p in trainee.named_parameters()}
        assert {names[id(p)] for p in decayed["params"]} == layers
        assert not any("embed" in name or "norm" in name or name.endswith("bias") for name in layers)


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    decayed, plain = parameter_groups(layer, 0.1)
    assert decayed["params"] == [] and [p is layer.bias for p in plain["params"]] == [True]


def test_moving_average():
    model = nn.BatchNorm1d(1)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    update_average(average, model, 0.75)
    assert average["weight"].item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert average["num_batches_tracked"].item() == 7  # integers are copied


def test_moving_average_is_that_of_each_weight_alone(tokenizer):
    for model in trainees(tokenizer):
        average = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
        floats = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        expected = {key: torch.lerp(average[key], value, 1 - 0.9) for key, value in floats.items()}
        update_average(average, model, 0.9)
        assert all(torch.equal(average[key], value) for key, value in expected.items())


WRONG = {
    "lr": 0.0, "min_lr": 5.0, "warmup_steps": -1, "beta1": 1.0, "beta2": -0.1, "max_grad_norm": 0.0,
    "weight_decay": -1.0,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG.items())
def test_wrong_settings(key, value):
    with pytest.raises(UserError, match=rf"^optim\.{key}: {value} is"):
        OptimConfig(**{key: value})
