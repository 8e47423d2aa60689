"""A metric of samples is a row of a table: results and the command line show it without knowing of it."""

import json
from collections import Counter

import numpy as np
import pytest
from torch.nn import functional

from consonar import cli, networks
from consonar.evaluation.sample_metrics import SAMPLE_METRICS
from consonar.metrics.shares import class_shift


class Halves:
    name, weights_sha256, num_features = "halves", "h" * 64, 6

    def __call__(self, images):
        return functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1).cpu()


def gap(measured):
    """Length of the difference between the means."""
    mean, _, _ = measured.reference.target.gaussians["reference"]
    return float((measured.samples.moments.mean - mean).norm())


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """results.json of one evaluation from the command line with toy metrics, and what was printed."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.FEATURE_NETWORKS, "halves", lambda device: Halves())
    monkeypatch.setitem(SAMPLE_METRICS, "gap({network})", gap)
    monkeypatch.setitem(SAMPLE_METRICS, "captions", lambda measured: "the samples carry no captions")
    monkeypatch.setitem(SAMPLE_METRICS, "nothing to ask", lambda measured: None)
    rng, images = np.random.default_rng(0), {}
    for name, low in (("samples", 0), ("reference", 100)):
        images[name] = rng.integers(low, low + 100, (12, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images[name])
    cli.main([
        "evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz"), "--draws", "2",
        "--feature-network", "halves", "--out", str(tmp_path / "results.json"), "--device", "cpu",
    ])  # fmt: skip
    return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out, images


def test_a_metric_is_measured_shown_and_stored_by_its_row(measured):
    results, printed, images = measured
    entry = results["metrics"]["gap(halves)"]
    difference = (images["samples"].astype(float) - images["reference"]) / 127.5
    of_halves = [difference[:, :, half].mean((0, 1, 2)) for half in (slice(4), slice(4, 8))]
    assert entry["value"] == pytest.approx(np.linalg.norm(of_halves), rel=1e-5) and entry["spread"] > 0
    assert "gap(halves)" in printed and f"{entry['value']:.4g}" in printed


def test_a_metric_says_why_it_has_no_value_or_nothing(measured):
    results, printed, _ = measured
    assert results["unavailable"]["captions"] == "the samples carry no captions"
    assert "captions: not measured (the samples carry no captions)" in printed
    assert "nothing to ask" not in printed and "nothing to ask" not in json.dumps(results)


@pytest.mark.parametrize(("classes", "count"), [(2, 20), (2, 2000), (10, 100), (150, 64), (150, 1024)])
def test_classes_that_are_drawn_are_in_no_other_shares_by_chance(classes, count):
    known = dict.fromkeys(range(classes), 60)
    for seed in range(25):
        drawn = Counter(np.random.default_rng(seed).integers(0, classes, count).tolist())
        assert not class_shift(drawn, known, seed)[1], seed
    equal = Counter((np.arange(count) * classes // count).tolist())
    assert not class_shift(equal, known, 0)[1]
    assert class_shift(dict.fromkeys(range(classes // 2), 60), known, 0) == (pytest.approx(0.5), True)


def test_other_shares_of_classes_are_told_from_small_differences_and_a_missing_class_too():
    assert class_shift({"a": 900, "b": 100}, {"b": 500, "a": 500}, 0) == (pytest.approx(0.4), True)
    assert class_shift({"a": 52_000, "b": 48_000}, {"a": 50_000, "b": 50_000}, 0) == (pytest.approx(0.02), False)
    few = dict.fromkeys(range(300), 50)
    assert class_shift(few, few | {300: 50}, 0) == (pytest.approx(1 / 301), True)
    assert class_shift(few | {300: 1}, few, 0)[1] is False
