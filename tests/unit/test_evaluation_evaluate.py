"""`evaluate` from files to results.json, with a small feature network whose features are known."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from consonar.errors import UserError
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.features import drawn_places, extract_features
from consonar.evaluation.inputs import ImageSet, encode_reference, load_samples, open_reference
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.metrics.kernels import kernel_distance
from consonar.metrics.neighbours import density_coverage, precision_recall


class Quadrants:
    """Features: the mean of each channel in each quarter of the image."""

    name, weights_sha256, num_features = "quadrants", "q" * 64, 12

    def __call__(self, images):
        return functional.adaptive_avg_pool2d(images, 2).flatten(1)


class GreyLevels:
    """A tokenizer of 12 tokens: the mean of each channel in each quarter in 8 steps."""

    name, fingerprint, vocab_size, num_tokens, code_dim, image_size, grid = "grey", "0", 8, 12, 1, 16, None

    def encode(self, images):
        return ((functional.adaptive_avg_pool2d(images, 2).flatten(1) + 1) / 2 * 7).round().long()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))


def flat_images(count, seed):
    """Images of four flat quarters, so that features and tokens of all of them differ."""
    quarters = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return quarters.repeat(8, 1).repeat(8, 2)  # (count, 16, 16, 3)


def npz_like(images):
    return ImageSet("memory", lambda size: (images[i : i + size] for i in range(0, len(images), size)))


def features_of(images):
    return Quadrants()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def distance(reference, samples):
    moments = []
    for images in (reference, samples):
        moments.append(Moments(12))
        moments[-1].update(features_of(images))
    return frechet_distance(moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov)


@pytest.fixture
def data(tmp_path):
    """A split image folder, and samples of which the first 5 are training images; names sort like the arrays."""
    images = {"train": flat_images(40, 0), "validation": flat_images(20, 1)}
    for split, array in images.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        for index, image in enumerate(array):
            Image.fromarray(image).save(tmp_path / "data" / split / f"{index:03}.png")
    images["samples"] = np.concatenate([images["train"][10:15], flat_images(25, 2)])
    tokens = GreyLevels().encode(torch.from_numpy(images["samples"]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    np.savez(
        tmp_path / "samples.npz", images=images["samples"], labels=np.arange(30) % 3, seeds=np.arange(30),
        tokens=tokens.numpy(), settings=json.dumps({"temperature": 0.9}),
    )  # fmt: skip
    return images


def test_metrics_against_a_split_folder(tmp_path, data):
    results = evaluate(
        tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(batch_size=7), feature_network=Quadrants()
    )
    values = {name: metric.value for name, metric in results.metrics.items()}
    train, validation, samples = (features_of(data[name]) for name in ("train", "validation", "samples"))
    precision, recall = precision_recall(train, samples)
    density, coverage = density_coverage(train, samples)
    assert values.pop("copy rate (features)") >= 5 / 30
    assert values == {
        "FD(quadrants) train": pytest.approx(distance(data["train"], data["samples"]), rel=1e-5),
        "FD(quadrants) validation": pytest.approx(distance(data["validation"], data["samples"]), rel=1e-5),
        "KID(quadrants) train": pytest.approx(kernel_distance(train, samples), rel=1e-4),
        "KID(quadrants) validation": pytest.approx(kernel_distance(validation, samples), rel=1e-4),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }
    copies = results.copies["features"]
    assert copies.is_copy[:5].all() and copies.indices[:5].tolist() == [10, 11, 12, 13, 14]
    assert results.num_samples == 30 and results.num_reference == {"train": 40, "validation": 20}
    floor = distance(data["train"], data["validation"])
    assert results.noise_floor == {"FD(quadrants) validation vs train": pytest.approx(floor, rel=1e-5)}
    assert results.unavailable == {"copy rate (tokens)": "the reference carries no tokens"}
    assert all(metric.spread is None for metric in results.metrics.values())


def test_copy_rate_in_tokens(tmp_path, data):
    reference = encode_reference(open_reference(tmp_path / "data", 16), GreyLevels(), batch_size=6)
    assert reference.tokens["train"].shape == (40, 12) and reference.tokens["validation"].shape == (20, 12)
    results = evaluate(tmp_path / "samples.npz", reference, feature_network=Quadrants())
    copies = results.copies["tokens"]
    assert copies.threshold >= 1 and copies.is_copy[:5].all()
    assert results.metrics["copy rate (tokens)"].value == float(copies.is_copy.double().mean())
    assert results.unavailable == {}
    without = replace(load_samples(tmp_path / "samples.npz"), tokens=None)
    results = evaluate(without, reference, feature_network=Quadrants())
    assert results.unavailable == {"copy rate (tokens)": "the samples carry no tokens"}


def test_the_spread_is_taken_over_disjoint_parts(tmp_path, data):
    options = {"feature_network": Quadrants()}
    single = evaluate(tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(batch_size=8), **options)
    drawn = evaluate(
        tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(batch_size=8, draws=3, seed=1), **options
    )
    again = evaluate(
        tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(batch_size=8, draws=3, seed=1), **options
    )
    other = evaluate(
        tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(batch_size=8, draws=3, seed=2), **options
    )
    # The values are those of all samples; the seed changes the order in which kernels are summed, and no more.
    expected = {k: pytest.approx(m.value, rel=1e-9) for k, m in single.metrics.items()}
    assert {k: m.value for k, m in drawn.metrics.items()} == expected
    assert drawn.metrics == again.metrics != other.metrics
    # The spread of the copy rate, from its definition: the parts have 10 images each.
    from consonar.metrics.distribution import random_parts

    places, _ = drawn_places(npz_like(data["samples"]), EvaluationSettings(seed=1))
    part_of = random_parts(places, 3)
    shares = [drawn.copies["features"].is_copy[part_of == part].double().mean() for part in range(3)]
    assert drawn.metrics["copy rate (features)"].spread == pytest.approx(float(torch.stack(shares).std()))
    distances = [distance(data["train"], data["samples"][(part_of == part).numpy()]) for part in range(3)]
    assert drawn.metrics["FD(quadrants) train"].spread == pytest.approx(np.std(distances, ddof=1), rel=1e-4)


def test_the_results_file(tmp_path, data):
    path = tmp_path / "results.json"
    results = evaluate(
        tmp_path / "samples.npz", tmp_path / "data", EvaluationSettings(draws=2, seed=5), feature_network=Quadrants()
    )
    named = evaluate(tmp_path / "samples.npz", tmp_path / "data", feature_network=Quadrants(), draws=2, seed=5)
    assert named.metrics == results.metrics
    results.to_json(path)
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["metrics"]["precision"] == {
        "value": results.metrics["precision"].value, "spread": results.metrics["precision"].spread,
    }  # fmt: skip
    assert content["samples"] == {
        "name": str(tmp_path / "samples.npz"),
        "sha256": hashlib.sha256((tmp_path / "samples.npz").read_bytes()).hexdigest(),
        "settings": {"temperature": 0.9},
    }
    assert content["feature_network"] == {"name": "quadrants", "sha256": "q" * 64}
    assert content["seed"] == 5 and content["num_samples"] == 30
    assert content["config"] == {
        "metrics": [], "num_neighbours": 3, "density_neighbours": 5, "max_neighbours_images": 10_000,
        "copy_quantile": 0.0, "validation_split": None,
        "batch_size": 64, "device": "cpu", "precision": "fp32", "draws": 2,
    }  # fmt: skip
    assert content["versions"].keys() >= {"python", "torch", "numpy", "pillow", "consonar", "threads"}
    assert content["copies"]["features"] == {"threshold": results.copies["features"].threshold, "quantile": 0.0}
    assert content["machine"] and content["timestamp"].endswith("+00:00") and content["reference"].endswith("data")
    with pytest.raises(UserError, match=r"results\.json already exists"):
        results.to_json(path)
    results.to_json(path, overwrite=True)
    before = (tmp_path / "samples.npz").read_bytes()
    with pytest.raises(UserError, match="holds no results, so it is not overwritten"):
        results.to_json(tmp_path / "samples.npz", overwrite=True)
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_an_npz_reference_is_one_set(tmp_path, data):
    np.savez(tmp_path / "reference.npz", arr_0=data["train"])
    results = evaluate(tmp_path / "samples.npz", tmp_path / "reference.npz", feature_network=Quadrants())
    kept = {"FD(quadrants)", "KID(quadrants)", "precision", "recall", "density", "coverage"}
    assert results.metrics.keys() == kept
    assert results.metrics["FD(quadrants)"].value == pytest.approx(distance(data["train"], data["samples"]), rel=1e-5)
    assert results.num_reference == {"reference": 40} and results.noise_floor == {}
    assert set(results.unavailable) == {"copy rate (features)", "copy rate (tokens)"}
    flat = tmp_path / "data" / "train"
    assert evaluate(tmp_path / "samples.npz", flat, feature_network=Quadrants()).metrics == results.metrics


def test_a_statistics_reference_gives_the_distance_only(tmp_path, data):
    features = features_of(data["train"]).numpy()
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    results = evaluate(tmp_path / "samples.npz", tmp_path / "statistics.npz", feature_network=Quadrants())
    assert results.metrics.keys() == {"FD(quadrants)"}
    assert results.metrics["FD(quadrants)"].value == pytest.approx(distance(data["train"], data["samples"]), rel=1e-4)
    assert results.unavailable["precision"] == "the reference holds statistics, no images"
    assert results.num_reference == {}
    for asked in (("kid", "precision"), ("copy-rate", "is")):
        line = f"metrics: {','.join(asked)}: reference .*statistics.npz holds statistics, no images; name one of images"
        with pytest.raises(UserError, match=line):
            evaluate(tmp_path / "samples.npz", tmp_path / "statistics.npz", metrics=asked, feature_network=Quadrants())
    with pytest.raises(UserError, match=r"metrics: copy-rate: reference .* has no train and validation images; name"):
        evaluate(
            tmp_path / "samples.npz", tmp_path / "samples.npz", metrics=("copy-rate",), feature_network=Quadrants()
        )
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="2048 features, quadrants has 12"):
        evaluate(tmp_path / "samples.npz", tmp_path / "other.npz", feature_network=Quadrants())


def test_samples_in_the_adm_layout_and_in_a_folder_give_the_same(tmp_path, data):
    np.savez(tmp_path / "adm.npz", data["samples"], np.arange(30))
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(data["samples"]):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{index:05}.png")
    adm, folder = load_samples(tmp_path / "adm.npz"), load_samples(tmp_path / "pictures")
    assert (adm.count, adm.image_size, adm.tokens) == (30, 16, None)
    assert (folder.count, folder.image_size, folder.tokens, folder.settings) == (30, 16, None, None)
    named = load_samples(tmp_path / "samples.npz")
    assert named.tokens.shape == (30, 12)
    metrics = [evaluate(s, tmp_path / "data", feature_network=Quadrants()).metrics for s in (adm, folder, named)]
    assert metrics[0] == metrics[1] == metrics[2]


def test_neighbours_are_kept_up_to_the_cap_and_moments_are_not(tmp_path, data):
    results = evaluate(
        tmp_path / "samples.npz",
        tmp_path / "data",
        EvaluationSettings(max_neighbours_images=12),
        feature_network=Quadrants(),
    )
    assert results.metrics["FD(quadrants) train"].value == pytest.approx(
        distance(data["train"], data["samples"]), rel=1e-5
    )
    train, samples = (
        extract_features(Quadrants(), npz_like(data[name]), EvaluationSettings(batch_size=5, max_neighbours_images=12))
        for name in ("train", "samples")
    )
    assert len(train.rows) == len(samples.rows) == 12
    expected = precision_recall(train.rows, samples.rows)
    assert (results.metrics["precision"].value, results.metrics["recall"].value) == expected
    assert len(results.copies["features"].is_copy) == 12


def test_samples_that_are_one_picture_are_said(tmp_path, data):
    for images, said in ((data["samples"][:1].repeat(30, 0), True), (data["samples"], False)):
        np.savez(tmp_path / "same.npz", images=images)
        found = evaluate(tmp_path / "same.npz", tmp_path / "data", EvaluationSettings(), feature_network=Quadrants())
        assert ("samples: all 30 are one picture to quadrants" in found.remarks) == said


def test_progress_names_every_set(tmp_path, data):
    seen = {}
    evaluate(
        tmp_path / "samples.npz", tmp_path / "data", feature_network=Quadrants(),
        progress=lambda name, *counts: seen.update({name: counts}),
    )  # fmt: skip
    assert sorted(seen.values()) == [(20, 20), (30, 30), (40, 40)]


def test_wrong_input_is_named(tmp_path, data):
    samples, reference, network = tmp_path / "samples.npz", tmp_path / "data", Quadrants()
    np.savez(tmp_path / "small.npz", images=data["train"][:, :8, :8])
    np.savez(tmp_path / "oblong.npz", images=data["train"][:, :8])
    np.savez(tmp_path / "labels.npz", images=data["train"], labels=np.arange(3))
    np.savez(tmp_path / "tokens.npz", images=data["train"], tokens=np.zeros((40, 4)))
    cases = [
        (lambda: load_samples(tmp_path / "none.npz"), "none.npz: cannot be read: No such file"),
        (lambda: load_samples(tmp_path / "oblong.npz"), "16 x 8 px; only square"),
        (lambda: load_samples(tmp_path / "labels.npz"), r"labels is int64 \(3,\); expected 1-d integers for 40 images"),
        (lambda: load_samples(tmp_path / "tokens.npz"), "tokens is float64"),
        (lambda: evaluate(samples, tmp_path / "small.npz", feature_network=network), "8 px, but the samples have 16"),
        (lambda: evaluate(samples, "openmoji-64", feature_network=network), "64 px.*16 px; use 'openmoji'"),
        (lambda: evaluate(samples, tmp_path / "nowhere", feature_network=network), "nowhere"),
        (lambda: evaluate(samples, reference, feature_network="vgg"), "feature_network: unknown 'vgg'"),
        (lambda: evaluate(samples, reference, EvaluationSettings(draws=10)), "30 images; 10 draws .* need 40 or more"),
        (lambda: evaluate(samples, reference, EvaluationSettings(draws=0)), "draws: 0"),
        (lambda: evaluate(samples, reference, EvaluationSettings(copy_quantile=2)), "copy_quantile: 2"),
        (lambda: evaluate(samples, reference, EvaluationSettings(num_neighbours=0)), "num_neighbours: 0"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
