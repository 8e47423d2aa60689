"""Teacher-forced entropy, and the temperature of equal entropy."""

import pytest
import torch

from consonar.errors import UserError
from consonar.evaluation.entropy import GRID, matching_temperature, teacher_forced_entropies
from consonar.training import losses
from consonar.types import Batch


@pytest.fixture
def batches(rng):
    images = torch.rand(5, 3, 16, 16, generator=rng) * 2 - 1
    labels = torch.arange(5) % 3
    return [Batch(condition=labels[:3], images=images[:3]), Batch(condition=labels[3:], images=images[3:])]


def test_entropy_is_the_mean_over_all_images_and_grows_with_temperature(tiny_generator, tokenizer, batches):
    model = tiny_generator().requires_grad_(False)
    found = teacher_forced_entropies(model, tokenizer, iter(batches), [0.5, 1.0, 2.0])
    images = torch.cat([batch.images for batch in batches])
    logits = model(tokenizer.encode(images), torch.arange(5) % 3)[0]
    assert found[1] == pytest.approx(float(losses.entropy(logits).mean()), rel=1e-5)
    assert found[0] < found[1] < found[2]


def test_the_matching_temperature_gives_the_entropy_back(tiny_generator, tokenizer, batches):
    model = tiny_generator().requires_grad_(False)
    entropies = teacher_forced_entropies(model, tokenizer, iter(batches), GRID)
    for temperature in (0.37, 0.9, 1.0, 1.5):
        (target,) = teacher_forced_entropies(model, tokenizer, iter(batches), [temperature])
        assert matching_temperature(entropies, target) == pytest.approx(temperature, abs=2e-3)


def test_an_entropy_out_of_reach_is_one_line():
    assert matching_temperature([1.0, 2.0, 4.0], 3.0, [0.5, 1.0, 2.0]) == pytest.approx(1.5)
    assert matching_temperature([1.0, 2.0, 4.0], 1.0, [0.5, 1.0, 2.0]) == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"entropy 5.000 is not reached at temperatures 0.5 to 2"):
        matching_temperature([1.0, 2.0, 4.0], 5.0, [0.5, 1.0, 2.0])
