"""sFID and the Inception score through `evaluate`, and references that bring statistics beside images, as ADM's do."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from consonar import cli, networks
from consonar.errors import UserError
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.features import drawn_places
from consonar.evaluation.inputs import load_samples
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import InceptionScore, frechet_distance, random_parts


class Scored:
    """Means of quarters as features, of rows as spatial features, and classes by the brightness of channels."""

    name, weights_sha256, num_features, num_spatial = "scored", "s" * 64, 12, 6

    def __call__(self, images):
        return self.outputs(images)[0]

    def outputs(self, images):
        features = functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return features, images.mean(3)[:, :, :2].flatten(1), (4 * images.mean((2, 3))).softmax(1)


class Plain:
    """The same features alone."""

    name, weights_sha256, num_features = "scored", "s" * 64, 12

    def __call__(self, images):
        return Scored()(images)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))


def noise(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def outputs_of(images):
    return Scored().outputs(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def distance(reference, samples):
    """Fréchet distance of features (R, F) and (S, F)."""
    sides = [(rows.double().mean(0), rows.double().T.cov()) for rows in (reference, samples)]
    return frechet_distance(*sides[0], *sides[1])


def inception_score(probabilities):
    score = InceptionScore(torch.zeros(len(probabilities), dtype=torch.int64))
    score.update(probabilities)
    return score.value


@pytest.fixture
def files(tmp_path):
    images = {"reference": noise(60, 0), "samples": noise(40, 1)}
    for name, array in images.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    return images


def test_a_network_with_scores_adds_two_metrics(tmp_path, files):
    reference, samples = (outputs_of(files[name]) for name in ("reference", "samples"))
    arguments = tmp_path / "samples.npz", tmp_path / "reference.npz"
    results = evaluate(*arguments, EvaluationSettings(batch_size=7), feature_network=Scored())
    of_images = {"FD(scored)", "KID(scored)", "precision", "recall", "density", "coverage"}
    assert results.metrics.keys() == {"sFD(scored)", "IS(scored)"} | of_images
    assert results.metrics["FD(scored)"].value == pytest.approx(distance(reference[0], samples[0]), rel=1e-5)
    assert results.metrics["sFD(scored)"].value == pytest.approx(distance(reference[1], samples[1]), rel=1e-5)
    assert results.metrics["IS(scored)"].value == pytest.approx(inception_score(samples[2]), rel=1e-6) != 1
    # The second call reads the reference from the cache; a plain network of that name does not find this entry.
    assert evaluate(*arguments, EvaluationSettings(batch_size=7), feature_network=Scored()).metrics == results.metrics
    plain = evaluate(*arguments, EvaluationSettings(batch_size=7), feature_network=Plain())
    assert plain.metrics.keys() == of_images
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2


def test_their_spread_is_taken_over_the_same_parts(tmp_path, files):
    settings = EvaluationSettings(draws=2, seed=3, batch_size=9)
    results = evaluate(tmp_path / "samples.npz", tmp_path / "reference.npz", settings, feature_network=Scored())
    part_of = random_parts(drawn_places(load_samples(tmp_path / "samples.npz").images, settings)[0], 2)
    _, spatial, probabilities = outputs_of(files["samples"])
    scores = [inception_score(probabilities[part_of == part]) for part in range(2)]
    assert results.metrics["IS(scored)"].spread == pytest.approx(np.std(scores, ddof=1), rel=1e-4)
    reference = outputs_of(files["reference"])[1]
    distances = [distance(reference, spatial[part_of == part]) for part in range(2)]
    assert results.metrics["sFD(scored)"].spread == pytest.approx(np.std(distances, ddof=1), rel=1e-4)


def test_a_noise_floor_of_both_distances(tmp_path, files):
    from consonar.evaluation.inputs import ReferenceSet, npz_image_set

    names = {"train": "reference", "validation": "samples"}
    images = {name: npz_image_set(tmp_path / f"{file}.npz")[0] for name, file in names.items()}
    floor = evaluate(tmp_path / "samples.npz", ReferenceSet("both", images), feature_network=Scored()).noise_floor
    train, validation = outputs_of(files["reference"]), outputs_of(files["samples"])
    assert floor == {
        "FD(scored) validation vs train": pytest.approx(distance(train[0], validation[0]), rel=1e-5),
        "sFD(scored) validation vs train": pytest.approx(distance(train[1], validation[1]), rel=1e-5),
    }


def statistics(images):
    """Arrays as ADM names them."""
    arrays = {}
    for suffix, rows in zip(("", "_s"), outputs_of(images), strict=False):
        arrays |= {f"mu{suffix}": rows.mean(0).numpy(), f"sigma{suffix}": np.cov(rows.numpy(), rowvar=False)}
    return arrays


def test_statistics_beside_images_give_the_distances_and_images_the_neighbours(tmp_path, files):
    """ADM's reference files: statistics of all training images, and some of the images."""
    others = noise(200, 2)
    np.savez(tmp_path / "adm.npz", arr_0=files["reference"], **statistics(others))
    results = evaluate(tmp_path / "samples.npz", tmp_path / "adm.npz", feature_network=Scored())
    plain = evaluate(tmp_path / "samples.npz", tmp_path / "reference.npz", feature_network=Scored())
    samples, known = outputs_of(files["samples"]), outputs_of(others)
    assert results.metrics["FD(scored)"].value == pytest.approx(distance(known[0], samples[0]), rel=1e-4)
    assert results.metrics["sFD(scored)"].value == pytest.approx(distance(known[1], samples[1]), rel=1e-4)
    for name in ("precision", "recall", "IS(scored)"):
        assert results.metrics[name] == plain.metrics[name]
    assert results.num_reference == {"reference": 60}
    assert set(results.unavailable) == {"copy rate (features)", "copy rate (tokens)"}


def test_a_file_in_the_layout_of_adms_reference_on_the_command_line(tmp_path, files, monkeypatch, capsys):
    """Images, statistics of others under ADM's names and labels, as `VIRTUAL_imagenet256_labeled.npz` has them."""
    monkeypatch.setitem(networks.FEATURE_NETWORKS, "inception", lambda device: Scored())
    others = noise(200, 2)
    labels = {"arr_1": np.arange(60) % 2}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=files["reference"], **labels, **statistics(others))
    monkeypatch.chdir(tmp_path)
    cli.main([
        "evaluate", "samples.npz", "--reference", "VIRTUAL_imagenet256_labeled.npz", "--feature-network", "inception",
        "--out", "results.json", "--device", "cpu",
    ])  # fmt: skip
    content, printed = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    values = {name: found["value"] for name, found in content["metrics"].items()}
    samples, known = outputs_of(files["samples"]), outputs_of(others)
    assert values["FD(scored)"] == pytest.approx(distance(known[0], samples[0]), rel=1e-4)
    assert values["sFD(scored)"] == pytest.approx(distance(known[1], samples[1]), rel=1e-4)
    assert {"IS(scored)", "KID(scored)", "precision", "recall", "density", "coverage"} <= values.keys()
    assert content["protocol"] == (
        "40 samples, scored, against VIRTUAL_imagenet256_labeled.npz: statistics of the file for FD and sFD, "
        "60 images as reference"
    )
    assert "40 samples, scored, against" in printed and "few images" not in printed
    assert content["reference_sha256"].keys() == {"reference", "statistics"}


def test_statistics_without_images(tmp_path, files):
    known = statistics(files["reference"])
    np.savez(tmp_path / "both.npz", **known)
    np.savez(tmp_path / "pooled.npz", mu=known["mu"], sigma=known["sigma"])
    np.savez(tmp_path / "other.npz", **known | {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)})
    results = evaluate(tmp_path / "samples.npz", tmp_path / "both.npz", feature_network=Scored())
    assert results.metrics.keys() == {"FD(scored)", "sFD(scored)", "IS(scored)"}
    assert results.unavailable["KID(scored)"] == "the reference holds statistics, no images"
    results = evaluate(tmp_path / "samples.npz", tmp_path / "pooled.npz", feature_network=Scored())
    assert results.metrics.keys() == {"FD(scored)", "IS(scored)"}
    assert results.unavailable["sFD(scored)"] == "the reference's statistics have no mu_s and sigma_s"
    with pytest.raises(UserError, match=r"2023 features, scored \(spatial\) has 6"):
        evaluate(tmp_path / "samples.npz", tmp_path / "other.npz", feature_network=Scored())


def test_a_streamed_inception_score_does_not_depend_on_the_batches(rng):
    probabilities = torch.randn(23, 5, generator=rng).softmax(1)
    expected = []
    for split in probabilities.double().split(10):  # from its definition; the last split has 3 rows
        marginal = split.mean(0)
        expected.append((split * (split / marginal).log()).sum(1).mean().exp())
    for sizes in ((23,), (1, 9, 13), (10, 10, 3), (0, 22, 1)):
        score = InceptionScore(torch.arange(23) // 10)
        for batch in probabilities.split(list(sizes)):
            score.update(batch)
        assert score.value == pytest.approx(float(torch.stack(expected).mean()), rel=1e-9)
    with pytest.raises(UserError, match="Inception score: 0 rows"):
        _ = InceptionScore(torch.arange(0)).value
