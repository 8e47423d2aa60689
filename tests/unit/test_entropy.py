"""Teacher-forced entropy, and the temperature of equal entropy."""

import weakref

import pytest
import torch
from PIL import Image

from consonar.components import save_generator
from consonar.data.splits import Splits
from consonar.errors import UserError
from consonar.evaluation import entropy
from consonar.evaluation.entropy import GRID, Sharpness, matching_temperature, teacher_forced_entropies
from consonar.origin import Origin
from consonar.training import losses
from consonar.types import ImageRecord, TokenBatch


@pytest.fixture
def batches(rng):
    tokens, labels = torch.randint(32, (5, 16), generator=rng), torch.arange(5) % 3
    return [TokenBatch(tokens[:3], labels[:3]), TokenBatch(tokens[3:], labels[3:])]


def test_entropy_is_the_mean_over_all_images_and_grows_with_temperature(tiny_generator, batches):
    model = tiny_generator().requires_grad_(False)
    found = teacher_forced_entropies(model, iter(batches), [0.5, 1.0, 2.0])
    logits = model(torch.cat([batch.tokens for batch in batches]), torch.arange(5) % 3)[0]
    assert found[1] == pytest.approx(float(losses.entropy(logits).mean()), rel=1e-5)
    assert found[0] < found[1] < found[2]


def test_the_matching_temperature_gives_the_entropy_back(tiny_generator, batches):
    model = tiny_generator().requires_grad_(False)
    entropies = teacher_forced_entropies(model, iter(batches), GRID)
    for temperature in (0.37, 0.9, 1.0, 1.5):
        (target,) = teacher_forced_entropies(model, iter(batches), [temperature])
        assert matching_temperature(entropies, target) == pytest.approx(temperature, abs=2e-3)


def test_an_entropy_out_of_reach_is_one_line():
    assert matching_temperature([1.0, 2.0, 4.0], 3.0, [0.5, 1.0, 2.0]) == pytest.approx(1.5)
    assert matching_temperature([1.0, 2.0, 4.0], 1.0, [0.5, 1.0, 2.0]) == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"entropy 5.000 is not reached at temperatures 0.5 to 2"):
        matching_temperature([1.0, 2.0, 4.0], 5.0, [0.5, 1.0, 2.0])


class Stream:
    """An `ImageSource` that makes every picture when it is asked for, and knows how many of them are held."""

    class_names = None

    def __init__(self, count, labels=True):
        self.name, self.count, self.labels, self.held, self.most, self.reads = "stream", count, labels, [], 0, 0

    def __iter__(self):
        for index in range(self.count):
            image = Image.new("RGB", (16, 16), (index, 2 * index, 255 - index))
            self.held = [*(known for known in self.held if known() is not None), weakref.ref(image)]
            self.most, self.reads = max(self.most, len(self.held)), self.reads + 1
            yield ImageRecord(image, str(index), index % 3 if self.labels else None)
            del image


def sharpness_of(source, tokenizer, monkeypatch):
    monkeypatch.setattr(entropy, "open_splits", lambda *args, **kwargs: Splits(source, source))
    return Sharpness("anywhere", tokenizer, 4)


def test_validation_images_are_streamed_once_and_only_when_an_entropy_is_asked_for(
    tiny_generator, tokenizer, monkeypatch, tmp_path
):
    source, sizes = Stream(40), []
    sharpness, encode = sharpness_of(source, tokenizer, monkeypatch), tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: sizes.append(len(images)) or encode(images))
    model = tiny_generator().requires_grad_(False)
    assert sharpness.entropies(model, [0.0]) == {} and source.reads == 0  # greedy sampling has no entropy
    found = sharpness.entropies(model, [1.0, 0.5])
    assert found[1.0] > found[0.5] and sharpness.entropies(model, [2.0])[2.0] > found[1.0]
    assert source.reads == 40 and sizes == [4] * 10 and source.most <= 9
    save_generator(model, tmp_path / "other", Origin())
    assert sharpness.match(model, tmp_path / "other") == pytest.approx(1, abs=2e-3) and len(sizes) == 10


def test_images_without_labels_measure_generators_of_one_class_alone(tiny_generator, tokenizer, monkeypatch, tmp_path):
    sharpness = sharpness_of(Stream(8, labels=False), tokenizer, monkeypatch)
    several, one = (tiny_generator(num_classes=count).requires_grad_(False) for count in (3, 1))
    save_generator(several, tmp_path / "several", Origin())
    assert "8 of 8 have no labels" in sharpness.entropies(several, [1.0])
    assert sharpness.entropies(one, [1.0])[1.0] > 0
    with pytest.raises(UserError, match=r"--match: .*several: .*no labels, and the generator has 3 classes"):
        sharpness.match(several, tmp_path / "several")
