"""What is measured on a part of a set is drawn over all of it: the order of files and classes changes nothing."""

import numpy as np
import pytest
import torch

from consonar.data.loader import ImageBatches
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.features import drawn_places, extract_features
from consonar.evaluation.inputs import ImageSet, ReferenceSet, SampleSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.sampling.job import balanced_labels


class Colours:
    """The mean colour, with class probabilities that tell dark from bright."""

    name, weights_sha256, num_features, num_spatial = "colours", "c" * 64, 3, 3

    def __call__(self, images):
        return self.outputs(images)[0]

    def outputs(self, images):
        means = images.mean((2, 3))
        return means, means, torch.stack([means[:, 0] > 0, means[:, 0] <= 0], 1).float()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))


def two_classes(count, seed):
    """Dark pictures, then bright ones: (count, 4, 4, 3)."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 60, (count, 1, 1, 3)) + 190 * (np.arange(count) >= count // 2)[:, None, None, None]
    return np.broadcast_to(colours, (count, 4, 4, 3)).astype(np.uint8)


def in_memory(images, name="memory"):
    return ImageSet(name, lambda size: (images[i : i + size] for i in range(0, len(images), size)))


def measure(samples, train, validation, **options):
    reference = ReferenceSet("r", {"train": in_memory(train), "validation": in_memory(validation)})
    given = SampleSet(in_memory(samples), len(samples), 4, "0")
    results = evaluate(given, reference, EvaluationSettings(**options), feature_network=Colours())
    return {name: metric.value for name, metric in results.metrics.items()}, results


def test_no_metric_depends_on_the_order_of_files_or_classes():
    samples, train, validation = two_classes(300, 0), two_classes(200, 1), two_classes(100, 2)
    shuffled = np.random.default_rng(3).permutation
    for options in ({"max_neighbours_images": 64}, {}):
        values, _ = measure(samples, train, validation, **options)
        permuted, _ = measure(
            samples[shuffled(300)], train[shuffled(200)], validation[shuffled(100)], batch_size=7, **options
        )
        assert permuted.keys() == values.keys() and {"precision", "recall", "copy rate (features)"} <= values.keys()
        for name, value in values.items():
            assert permuted[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    # Half of a sorted set is not its first class: samples of either class lie where the reference is.
    limited, _ = measure(samples, train, validation, max_neighbours_images=100)
    assert limited["precision"] > 0.8 and limited["recall"] > 0.8


def test_the_inception_score_of_samples_that_are_sorted_by_class_is_that_of_shuffled_ones(monkeypatch):
    monkeypatch.setattr("consonar.metrics.distribution.InceptionScore.drawn.__func__.__defaults__", (50,))
    samples = two_classes(400, 0)
    values, results = measure(samples, two_classes(40, 1), two_classes(40, 2))
    # Certain predictions of two equally frequent classes score 2; splits of a single class would score 1.
    assert values["IS(colours)"] == pytest.approx(2, abs=0.05) and not any("IS(" in line for line in results.remarks)
    values, results = measure(samples[:351], two_classes(40, 1), two_classes(40, 2))
    assert values["IS(colours)"] < 1.95  # one of 8 parts has one picture, and scores 1
    assert any("IS(colours): its last part has 1 samples" in line for line in results.remarks)


def test_the_drawn_rows_are_named_by_their_place_in_the_set():
    train = two_classes(200, 1)
    found = extract_features(Colours(), in_memory(train), EvaluationSettings(batch_size=9, max_neighbours_images=30))
    assert found.rows.shape == (30, 3) and (found.indices.diff() > 0).all()
    expected = torch.from_numpy(train[found.indices.numpy()].mean((1, 2)) / 127.5 - 1).float()
    torch.testing.assert_close(found.rows, expected)
    assert 5 <= int((found.indices < 100).sum()) <= 25  # both halves, and not half of each by rule
    other = extract_features(
        Colours(), in_memory(train), EvaluationSettings(batch_size=9, max_neighbours_images=30, seed=1)
    )
    assert not torch.equal(other.indices, found.indices)
    _, results = measure(train[40:60], train, two_classes(100, 2), max_neighbours_images=100)
    copies = results.copies["features"]
    same = (train[copies.indices] == train[40:60][copies.rows]).all((1, 2, 3))
    assert same.sum() >= 4 and bool(copies.is_copy[torch.from_numpy(same)].all())


def test_equal_pictures_are_drawn_as_often_as_they_occur():
    images = np.zeros((1000, 1, 1, 3), np.uint8)
    images[:500, 0, 0, :2] = np.stack(np.divmod(np.arange(500), 256), 1) + 1  # 500 different ones, 500 equal ones
    shares = []
    for seed in range(20):
        places, _ = drawn_places(in_memory(images), EvaluationSettings(seed=seed))
        shares.append(float((places[:500] < 100).double().sum() / 100))
    assert 0.45 < np.mean(shares) < 0.55 and np.std(shares) < 0.1


@pytest.mark.parametrize("label_of", [lambda i: i // 10, lambda i: i % 10], ids=["sorted", "in turns"])
def test_a_part_of_the_validation_items_covers_all_classes_in_any_order(label_of):
    labels = label_of(torch.arange(100))
    images = torch.zeros(100, 2, 2, 3, dtype=torch.uint8)
    items = ImageBatches(100, "here", lambda rows: (images[rows], labels[rows]), batch_size=50, seed=0)
    seen = torch.cat([batch.condition for batch in items.ordered(50, 50)])
    assert len(seen) == 50 and len(seen.unique()) == 10 and torch.bincount(seen).max() <= 10
    # Ten items of a set whose classes take turns: equal steps of ten would show a single class.
    few = torch.cat([batch.condition for batch in items.ordered(50, 10)])
    assert len(few) == 10 and len(few.unique()) > 4


def test_fewer_samples_than_classes_are_of_classes_over_the_whole_range():
    assert balanced_labels(4, 1000).tolist() == [0, 250, 500, 750]
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1] and balanced_labels(3, 3).tolist() == [0, 1, 2]
