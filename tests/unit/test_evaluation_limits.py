"""Sets that are equal, few, constant, damaged or foreign: the right number, or one line."""

import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional

from consonar.errors import UserError
from consonar.evaluation.evaluate import distance_of_draws, evaluate
from consonar.evaluation.inputs import ImageSet, ReferenceSet, SampleSet, load_samples, open_reference
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import Moments, frechet_distance, symmetric_root
from consonar.origin import Origin
from consonar.sampling.job import write_npz


class Cells:
    """Features: the pixels of a 4 x 4 image; more of them than most sets here have images."""

    name, weights_sha256, num_features = "cells", "p" * 64, 48

    def __call__(self, images):
        return functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))


def noise(count, seed, size=4):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def in_memory(images, name="memory"):
    return ImageSet(name, lambda size: (images[i : i + size] for i in range(0, len(images), size)))


def measured(samples, reference, network=None, **options):
    given = SampleSet(in_memory(samples, "samples"), len(samples), 4, "0")
    known = ReferenceSet("known", {"reference": in_memory(reference)})
    return evaluate(given, known, EvaluationSettings(**options), feature_network=network or Cells())


def moments_of(features):
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


ALL = ("fd", "kid", "fd-infinity", "precision", "recall")


@pytest.mark.parametrize("count", [10, 400])
def test_a_set_is_at_distance_zero_from_itself_in_any_order(count):
    images = noise(count, 0)
    for samples in (images, images[np.random.default_rng(1).permutation(count)]):
        values = measured(samples, images, batch_size=7, metrics=ALL).metrics
        distances = ("FD(cells)", "KID(cells)", "FD-infinity(cells)")
        assert [values[name].value for name in distances] == [0, 0, 0] and values["FD-infinity(cells)"].error == 0
        assert (values["precision"].value, values["recall"].value) == (1, 1)


@pytest.mark.parametrize("count", [5, 30, 200])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_distance_is_never_negative_and_a_small_one_is_no_zero(count, scale, rng):
    """Of a shift by a small vector the distance is its squared length, whatever the covariance and its rank."""
    features = scale * torch.randn(count, 60, generator=rng, dtype=torch.float64) * torch.logspace(0, -6, 60)
    one, shift = moments_of(features), torch.zeros(60, dtype=torch.float64)
    shift[0] = 1e-4 * scale
    found = frechet_distance(one.mean, one.cov, one.mean + shift, one.cov)
    assert found == pytest.approx(1e-8 * scale**2, rel=1e-3)
    assert frechet_distance(one.mean, one.cov, one.mean, one.cov) == 0
    for factor in (1e-3, 0.1):  # (1 + f)^2 times the covariance: f^2 times its trace
        found = frechet_distance(one.mean, one.cov, one.mean, (1 + factor) ** 2 * one.cov)
        assert found == pytest.approx(factor**2 * float(one.cov.trace()), rel=1e-3)
    other = moments_of(features + 1e-13 * scale * torch.randn(count, 60, generator=rng, dtype=torch.float64))
    assert frechet_distance(one.mean, one.cov, other.mean, other.cov) >= 0


def test_what_perfect_samples_score_is_said_where_samples_are_few(rng):
    reference, few, enough = noise(600, 0), noise(30, 1), noise(500, 2)
    result = measured(few, reference)
    (line,) = result.remarks
    assert "FD(cells) is biased upwards by few samples: 30 draws" in line and "48 features" in line and "\n" not in line
    said = float(line.split(" score ")[1].split(";")[0])
    # The samples come from the distribution of the reference: their distance is that bias and little else.
    assert said == pytest.approx(result.metrics["FD(cells)"].value, rel=0.25)
    assert measured(few, reference, seed=5).remarks == result.remarks  # the number is the reference's
    assert measured(enough, reference).remarks == ()
    (line,) = measured(enough, noise(100, 3)).remarks
    assert "by few images of the reference, too (reference 100, 48 features)" in line


def test_a_copy_rate_that_cannot_see_a_copy_is_said():
    train, held_out = noise(20, 0), noise(5, 1)
    given = SampleSet(in_memory(train, "samples"), 20, 4, "0", tokens=torch.zeros(20, 4, dtype=torch.int64))
    for leaked, said in ((held_out, 0), (np.concatenate([held_out, train[:1]]), 1)):
        sets = {"train": in_memory(train), "validation": in_memory(leaked)}
        result = evaluate(given, ReferenceSet("known", sets), feature_network=Cells())
        assert sum("copy rate (features) cannot see a copy" in line for line in result.remarks) == said
        assert result.metrics["copy rate (features)"].value == 1 - said  # all are training images


def test_balls_of_pictures_that_are_there_many_times_are_told():
    known = noise(60, 0)
    for times, said in (
        (5, []),
        (6, ["density and coverage: 12 of 70 pictures of the reference are there more than 5"]),
    ):
        copies = np.concatenate([known[: 70 - 2 * (times - 1)], *[known[:2]] * (times - 1)])
        result = measured(copies, copies, metrics=("density", "coverage"))
        assert [line.partition(" times, ")[0] for line in result.remarks] == said
        assert (result.metrics["coverage"].value == 1) != bool(said)
    assert measured(copies, copies, metrics=("precision",)).remarks == ()


@pytest.mark.parametrize("count", [10, 40, 400])
def test_the_distance_of_draws_is_that_of_drawn_features(count, rng):
    mixing = torch.randn(20, 20, generator=rng, dtype=torch.float64)
    cov = mixing @ mixing.T
    root = symmetric_root(cov)
    drawn = []
    for _ in range(40):
        moments = moments_of(torch.randn(count, 20, generator=rng, dtype=torch.float64) @ root)
        drawn.append(frechet_distance(torch.zeros(20), cov, moments.mean, moments.cov))
    found = [distance_of_draws(root, count, seed) for seed in range(40)]
    error = (np.var(drawn) / 40 + np.var(found) / 40) ** 0.5
    assert abs(np.mean(drawn) - np.mean(found)) < 4 * error and np.mean(found) > 0


def test_sets_without_any_variance_are_measured():
    grey, white = np.full((8, 4, 4, 3), 100, np.uint8), np.full((8, 4, 4, 3), 255, np.uint8)
    assert measured(grey, grey).metrics["FD(cells)"].value == 0
    expected = 48 * (2 * 155 / 255) ** 2
    values = measured(white, grey).metrics
    assert values["FD(cells)"].value == pytest.approx(expected, rel=1e-5) and values["precision"].value == 0
    # Against noise: the squared length between the means, and all of the variance.
    moments = moments_of(Cells()(torch.from_numpy(noise(50, 0)).permute(0, 3, 1, 2).float() / 127.5 - 1))
    gap = (moments.mean - (2 * 100 / 255 - 1)).square().sum() + moments.cov.trace()
    assert measured(noise(50, 0), grey).metrics["FD(cells)"].value == pytest.approx(float(gap), rel=1e-5)


class Broken(Cells):
    def __call__(self, images):
        features = super().__call__(images)
        features[images.mean((1, 2, 3)) == 1, 3] = torch.nan  # for a white picture
        return features


class Huge(Cells):
    def __call__(self, images):
        return super().__call__(images) * 1e25


class Narrow(Cells):
    def __call__(self, images):
        return super().__call__(images)[:, :5]


WHITE = np.concatenate([noise(9, 0), np.full((1, 4, 4, 3), 255, np.uint8), noise(9, 1)])


@pytest.mark.parametrize(("samples", "reference", "options", "message"), [
    (noise(9, 0), noise(1, 1), {}, "reference known: 1 image.* as reference; .*3 neighbours needs 4 or more"),
    (noise(9, 0), noise(3, 1), {}, "reference known: 3 image"),
    (noise(9, 0), noise(0, 1), {}, "reference known: 0 image"),
    (WHITE, noise(9, 1), {"network": Broken()}, "cells: gives NaN or infinity for image 9 of samples"),
    (noise(9, 0), WHITE, {"network": Broken(), "batch_size": 4}, "cells: gives NaN or infinity for image 9 of memory"),
    (noise(9, 0), noise(9, 1), {"network": Huge()}, "cells: gives numbers whose squares are not float32 for image 0"),
    (noise(9, 0), noise(9, 1), {"network": Narrow()}, r"cells: gives shape \(9, 5\), expected \(9, 48\)"),
    (noise(9, 0) / 255, noise(9, 1), {}, "images: float64 .*expected uint8"),
    (noise(9, 0), noise(9, 1)[..., :1], {}, r"images: uint8 \(9, 4, 4, 1\); expected uint8"),
    (noise(9, 0), noise(9, 1), {"max_neighbours_images": 3}, "max_neighbours_images: 3"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(samples, reference, options, message):
    with pytest.raises(UserError, match=message) as caught:
        measured(samples, reference, **options)
    assert "\n" not in str(caught.value)


MU, SIGMA = np.zeros(48), np.eye(48)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"mu": SIGMA, "sigma": MU}, r"mu has shape \(48, 48\), sigma \(48,\); expected .*; are the two exchanged\?"),
    ({"mu": MU}, "s.npz: holds mu without sigma"),
    ({"mu": MU, "sigma": np.eye(40)}, r"mu has shape \(48,\), sigma \(40, 40\)"),
    ({"mu": np.float64(1), "sigma": SIGMA}, r"mu has shape \(\)"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "2048 features, cells has 48"),
    ({"mu": MU + np.nan, "sigma": SIGMA}, "mu holds NaN or infinity; expected finite"),
    ({"mu": MU, "sigma": SIGMA + np.inf}, "sigma holds NaN or infinity; expected finite"),
    ({"mu": MU + 1e200, "sigma": SIGMA}, r"holds NaN or numbers over 1e\+30"),
    ({"mu": MU, "sigma": SIGMA * 1e300}, r"holds NaN or numbers over 1e\+30"),
    ({"mu": MU.astype(str), "sigma": SIGMA}, "mu is <U"),
    ({"mu": MU, "sigma": SIGMA * 1j}, "sigma is complex128"),
    ({"mu": MU, "sigma": -SIGMA}, r"reference .*s\.npz: covariance: .*not a covariance"),
    ({"mu": MU, "sigma": np.triu(np.ones((48, 48)))}, r"s\.npz: covariance: not symmetric"),
])  # fmt: skip
def test_statistics_that_are_not_of_this_network_are_one_line(arrays, message, tmp_path):
    write_npz(tmp_path / "s.npz", arrays)
    given = SampleSet(in_memory(noise(9, 0)), 9, 4, "0")
    with pytest.raises(UserError, match=message) as caught:
        evaluate(given, open_reference(tmp_path / "s.npz", 4), feature_network=Cells())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"images": noise(5, 1)}, "holds images and arr_0, which are names of one array; keep one"),
    ({"labels": np.zeros(9, int), "arr_1": np.ones(9, int)}, "holds labels and arr_1"),
    ({"tokens": np.full((9, 4), -3)}, "tokens from -3 to -3; a tokenizer counts its codes from 0"),
    ({"tokens": np.full((9, 4), 2**40)}, "tokens from 1099511627776 to"),
    ({"arr_0": noise(9, 0).astype(np.float32) * np.nan}, r"is float32 .*; expected uint8 .* with levels from 0"),
    ({"arr_0": noise(9, 0)[..., :2]}, r"arr_0 is uint8 \(9, 4, 4, 2\); expected uint8 \(count"),
    ({"arr_0": noise(9, 0)[:, :3]}, "images of 4 x 3 px; only square"),
    ({"arr_0": noise(0, 0)}, r"arr_0 holds no image; its shape is \(0, 4, 4, 3\)"),
    ({"labels": np.arange(8)}, r"labels is int64 \(8,\); expected 1-d integers for 9 images"),
])  # fmt: skip
def test_samples_that_say_two_things_or_nothing_are_refused(arrays, message, tmp_path):
    write_npz(tmp_path / "s.npz", {"arr_0": noise(9, 0)} | arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_samples(tmp_path / "s.npz")
    assert "\n" not in str(caught.value)


def test_statistics_are_no_samples(tmp_path):
    write_npz(tmp_path / "s.npz", {"mu": MU, "sigma": SIGMA})
    with pytest.raises(UserError, match="it holds mu, sigma; statistics are given as --reference"):
        load_samples(tmp_path / "s.npz")


def test_statistics_of_another_network_beside_images_are_seen(tmp_path):
    """A file with images tells whose statistics it has; one of the same data and network passes."""
    images = noise(60, 1)
    moments = moments_of(Cells()(torch.from_numpy(noise(300, 2)).permute(0, 3, 1, 2).float() / 127.5 - 1))
    mean, cov = moments.mean.numpy(), moments.cov.numpy()
    given = SampleSet(in_memory(noise(30, 0)), 30, 4, "0")
    for factor, offset, fits in ((1, 0, True), (1, 1, False), (-3, 2, False)):
        write_npz(tmp_path / "s.npz", {"arr_0": images, "mu": factor * mean + offset, "sigma": factor**2 * cov})
        if fits:
            result = evaluate(given, open_reference(tmp_path / "s.npz", 4), feature_network=Cells())
            # The distance is to the statistics: how few the images beside them are does not matter to it.
            (line,) = result.remarks
            assert "FD(cells) is biased upwards by few samples" in line
            continue
        with pytest.raises(UserError, match=r"statistics are not of its images.*another feature network") as caught:
            evaluate(given, open_reference(tmp_path / "s.npz", 4), feature_network=Cells())
        assert "\n" not in str(caught.value)


def test_the_device_holds_a_batch_of_pictures_at_a_time():
    """50,000 pictures of 256 px in batches of 64 are 50 MB there, in the place of 39 GB."""
    alive, most = [], [0]

    class Watched(Cells):
        def __call__(self, images):
            alive.append(weakref.ref(images))
            most[0] = max(most[0], sum(len(one) for ref in alive if (one := ref()) is not None))
            return super().__call__(images)

    sets = {name: in_memory(noise(count, count), name) for name, count in (("train", 60), ("validation", 40))}
    given = SampleSet(in_memory(noise(50, 0)), 50, 4, "0", labels=torch.arange(50) % 2)
    evaluate(given, ReferenceSet("known", sets), EvaluationSettings(batch_size=8), feature_network=Watched())
    assert most == [8] and len(alive) == 8 + 5 + 7


GROWTH = """
import resource, sys
import numpy as np, torch
from consonar.evaluation.features import extract_features
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.settings import EvaluationSettings

class Wide:
    name, weights_sha256, num_features = "wide", "0", 1024
    def __call__(self, images):
        return torch.randn(len(images), 3 * 1024)[:, :1024]

count = int(sys.argv[1])
batches = lambda size: (np.full((size, 4, 4, 3), start % 251, np.uint8) for start in range(0, count, size))
extract_features(Wide(), ImageSet("s", batches), EvaluationSettings(), torch.arange(count), max_rows=count)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_with_the_number_of_pictures_only_their_features_grow():
    """In processes of their own, in MB: rows that wait between batches that come and go took 2.6 times their size."""
    small, large = (
        float(subprocess.run([sys.executable, "-c", GROWTH, str(count)], capture_output=True, check=True).stdout)
        for count in (2048, 16_384)
    )
    assert large - small < 2 * (16_384 - 2048) * 1024 * 4 / 2**20


def test_tokens_of_two_tokenizers_are_not_compared():
    tokens = torch.zeros(9, 4, dtype=torch.int64)
    given = SampleSet(in_memory(noise(9, 0)), 9, 4, "0", tokens=tokens, settings={"tokenizer_fingerprint": "one"})
    sets = {name: in_memory(noise(9, seed)) for seed, name in enumerate(("train", "validation"))}
    known = ReferenceSet(
        "known", sets, tokens=dict.fromkeys(sets, tokens), origin=Origin(tokenizer="b", tokenizer_fingerprint="two")
    )
    with pytest.raises(UserError, match=r"the tokenizer is 'b' \(two\)"):
        evaluate(given, known, feature_network=Cells())


def test_statistics_given_as_tensors_are_checked_as_well():
    given, mean, cov = SampleSet(in_memory(noise(9, 0)), 9, 4, "0"), torch.zeros(48), torch.eye(48)
    for statistics, message in [
        ((cov, mean), r"mean \(48, 48\) and covariance \(48,\).*exchanged\?"),
        ((mean * torch.nan, cov), "holds NaN"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(given, ReferenceSet("known", {}, statistics), feature_network=Cells())
