"""The files of a measured run: replaced together, and of the model that the run has."""

import json

import numpy as np
import pytest
import torch
from conftest import picture

from consonar.components import load_tokenizer, save_generator, save_tokenizer
from consonar.errors import UserError
from consonar.evaluation import kept, runs
from consonar.evaluation.inputs import encode_reference, open_reference
from consonar.evaluation.results import is_measured, read_results, replacing
from consonar.evaluation.runs import RunSettings
from consonar.files.writers import file_sha256
from consonar.origin import Origin
from consonar.report import folders

pytestmark = pytest.mark.usefixtures("quarters")


def save_run(folder, generator, tokenizer_folder, tokenizer):
    origin = Origin(tokenizer=str(tokenizer_folder), tokenizer_fingerprint=tokenizer.fingerprint)
    save_generator(generator, folder / "model", origin)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path, tiny_generator, tokenizer_folder, tokenizer):
    return save_run(tmp_path / "run", tiny_generator(), tokenizer_folder, tokenizer)


def measure(run, picture_folder, *, target=None, overwrite=False, **settings):
    settings = RunSettings(**{"num_samples": 12, "draws": 2} | settings)
    return runs.evaluate_run(
        run, settings, reference=str(picture_folder), feature_network="quarters", target=target, overwrite=overwrite
    )


def files(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_samples_of_a_killed_measurement_go_with_the_next_whatever_its_temperatures(run, picture_folder):
    (run / ".samples_t0.9.npz.parts").mkdir()
    (run / ".samples_t0.9.npz.parts" / "shard_00000000_512.npz").touch()
    (run / ".samples_t0.9.npz").touch()
    measure(run, picture_folder, temperatures=(1.0,))
    assert not list(run.glob(".*")) and (run / "samples_t1.npz").is_file()


@pytest.mark.parametrize("fails", ["compare", "measure_reconstruction"])
def test_results_stay_until_the_new_ones_are_complete(run, picture_folder, monkeypatch, fails):
    measure(run, picture_folder, temperatures=(1.0, 0.5))
    before, function, calls = files(run), getattr(runs, fails), []

    def breaks(*args, **options):
        calls.append(args)
        if fails == "measure_reconstruction" or len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, fails, breaks)
        measure(run, picture_folder, temperatures=(1.0, 0.5), seed=7, overwrite=True)
    after = {path: content for path, content in files(run).items() if not str(path).startswith(".samples_t")}
    assert after == before
    content = measure(run, picture_folder, temperatures=(1.0, 0.8), seed=7, overwrite=True)
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(content))
    assert sorted(path.name for path in run.glob("samples_*")) == ["samples_t0.8.npz", "samples_t1.npz"]
    for row in content["rows"]:
        assert row["samples_sha256"] == file_sha256(run / row["samples"])
    assert not list(run.glob(".evaluation*"))


def test_a_failure_replaces_nothing_and_a_killed_one_leaves_nothing(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [{"samples": "samples_t1.npz"}, {"samples": "../other"}]}')
    for name in ("samples_t1.npz", "mine.npz"):
        (tmp_path / name).write_text("old")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path, "results.json", overwrite=True) as staged:
        (staged / "results.json").write_text("{}")
        raise ValueError("stop")
    assert files(tmp_path) == before
    (tmp_path / ".evaluation.partial").mkdir()
    (tmp_path / ".evaluation.partial" / "samples_t9.npz").write_text("of a process that was killed")
    with replacing(tmp_path, "results.json", overwrite=True) as staged:
        (staged / "results.json").write_text('{"rows": []}')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npz", "results.json"]


def test_results_are_of_the_weights_that_the_run_has(run, picture_folder, tiny_generator, tokenizer_folder, tokenizer):
    assert not is_measured(run)
    content = measure(run, picture_folder, reconstruct=False)
    assert is_measured(run) and read_results(run) == json.loads(json.dumps(content))
    assert content["checkpoint_sha256"] == file_sha256(run / "model" / "model.safetensors")
    assert content["reference"]["train_sha256"] != content["reference"]["validation_sha256"]
    save_run(run, tiny_generator(seed=1), tokenizer_folder, tokenizer)
    assert not is_measured(run)
    with pytest.raises(UserError, match="of weights that have changed since; evaluate again with --overwrite"):
        read_results(run)
    with pytest.raises(UserError, match="exists of weights that have changed since; add --overwrite"):
        measure(run, picture_folder)


def test_every_run_that_is_matched_has_a_row(
    run, picture_folder, tmp_path, tiny_generator, tokenizer_folder, tokenizer
):
    twins = [save_run(tmp_path / name, tiny_generator(), tokenizer_folder, tokenizer) for name in ("one", "two")]
    rows = measure(run, picture_folder, temperatures=(0.5,), match=twins, reconstruct=False)["rows"]
    assert [row.get("matched_to") for row in rows] == [None, "one", "two"]
    assert rows[1]["matched_sha256"] == file_sha256(twins[0] / "model" / "model.safetensors")
    assert rows[1]["temperature"] == rows[2]["temperature"] == pytest.approx(1, abs=2e-3)


def test_a_shared_reference_is_that_of_the_run(run, picture_folder, tokenizer, tmp_path):
    target = encode_reference(open_reference(picture_folder, 16), tokenizer)
    assert measure(run, picture_folder, target=target)["rows"]
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.mul_(2)
    save_tokenizer(tokenizer, tmp_path / "other")
    foreign = encode_reference(target, load_tokenizer(tmp_path / "other"))
    for wrong, reference in ((foreign, picture_folder), (target, picture_folder / "train")):
        with pytest.raises(UserError, match="target: "):
            measure(run, reference, target=wrong, overwrite=True)


def test_more_classes_than_pictures_are_kept_of_are_shown_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "KEPT_IMAGES", 4)
    for count, labels in ((12, [0, 3, 6, 9]), (5, [0, 2, 4, 7])):
        classes = np.arange(count) * 10 // count if count < 10 else np.arange(count) % 10
        images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
        np.savez(tmp_path / "drawn.npz", arr_0=images, labels=classes, seeds=np.arange(count))
        kept.keep_samples(tmp_path / "drawn.npz", tmp_path / "kept.npz", None, {}, None)
        with np.load(tmp_path / "kept.npz") as found:
            assert len(found["labels"]) == 4 and np.abs(found["labels"] - labels).max() <= 2
            assert (found["images"][:, 0, 0, 0] == found["seeds"]).all()


def test_a_run_says_why_metrics_of_its_samples_are_missing(run, picture_folder):
    content = measure(run, picture_folder / "train", reconstruct=False)
    reason = "the reference has no train and validation images"
    assert content["unavailable"]["copy rate (tokens)"] == content["unavailable"]["copy rate (features)"] == reason
    assert content["unavailable"]["entropy (teacher-forced)"] == "the reference has none"


def test_temperatures_that_are_nearly_equal_have_files_of_their_own(run, picture_folder):
    content = measure(run, picture_folder, temperatures=(0.1234567, 0.1234568), reconstruct=False)
    for row in content["rows"]:
        assert file_sha256(run / row["samples"]) == row["samples_sha256"]
    assert len({row["samples"] for row in content["rows"]}) == 2


def test_a_reference_that_cannot_be_measured_against_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    for split in ("train", "validation"):
        (tmp_path / "one" / split / "all").mkdir(parents=True)
        picture(0).save(tmp_path / "one" / split / "all" / "0.png")
    monkeypatch.delattr(runs, "run_job")
    with pytest.raises(UserError, match=r"reference .*: 1 image\(s\) as train"):
        measure(run, tmp_path / "one")


def test_metrics_that_are_asked_for_are_in_the_results_with_their_errors_and_classes(
    tmp_path, run, picture_folder, tiny_generator, tokenizer_folder, tokenizer, monkeypatch
):
    """And the page reads them; labels of other classes are found before a network reads anything."""
    asked = ("fd", "fd-infinity", "fd-per-class", "kid")
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"fd-per-class: .*on one side only"):
        patched.delattr("consonar.evaluation.reference.cached_features")
        measure(run, picture_folder, metrics=asked, reconstruct=False)
    run = save_run(tmp_path / "one", tiny_generator(num_classes=1), tokenizer_folder, tokenizer)
    content = measure(run, picture_folder, metrics=asked, reconstruct=False)
    (row,) = content["rows"]
    kept = {"FD", "FD-infinity", "FD per class", "KID"}
    assert {name.partition("(")[0] for name in row["metrics"] if "(quarters)" in name} == kept
    assert row["metrics"]["FD-infinity(quarters) train"]["error"] > 0
    assert content["protocol"].startswith("12 samples, quarters, against ") and "images as train" in content["protocol"]
    whole, of_classes = (row["metrics"][f"{kind}(quarters) train"] for kind in ("FD", "FD per class"))
    assert of_classes["classes"] == {"0": pytest.approx(whole["value"], rel=1e-4)}
    shown = folders.read_results(run / "results.json").rows[0].metrics
    assert {name: found.record() for name, found in shown.items()} == row["metrics"]
