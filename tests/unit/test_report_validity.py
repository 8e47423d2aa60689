"""What the page leaves out: results of weights that changed since, and numbers that cannot be compared."""

import json

import pytest
from test_report import Page, write_results, write_run

from consonar.errors import UserError
from consonar.files.writers import file_sha256
from consonar.report import load_runs, write_report


def change(run, **entries):
    """Entries of results.json, all rows' with a leading underscore."""
    content = json.loads((run / "results.json").read_text())
    for row in content["rows"]:
        row.update({key.removeprefix("_"): value for key, value in entries.items() if key.startswith("_")})
    content.update({key: value for key, value in entries.items() if not key.startswith("_")})
    (run / "results.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    """Two runs with models and their results."""
    made = [write_run(tmp_path / "plain"), write_run(tmp_path / "rear", weight=1.0, noise=0.5)]
    for run, value in zip(made, (64.5, 58.75), strict=True):
        write_results(run, {1.0: value, 0.9: value + 1})
        (run / "model").mkdir()
        (run / "model" / "model.safetensors").write_text(run.name)
        change(run, checkpoint_sha256=file_sha256(run / "model" / "model.safetensors"))
    return made


def text_of(runs, out):
    return Page(write_report(runs, out, overwrite=True).read_text()).text.replace("\u00a0", " ")


def test_results_of_a_model_that_was_trained_on_since_are_not_shown_and_the_page_says_so(runs, tmp_path):
    assert [bool(run.results.rows) for run in load_runs(runs)] == [True, True]
    (runs[1] / "model" / "model.safetensors").write_text("trained on")
    text = text_of(runs, tmp_path / "page.html")
    assert "The results of rear are not shown: they are of weights that have changed since; evaluate again" in text
    assert "58.8" not in text and "64.5 ± 1.0" in text
    change(runs[0], checkpoint_sha256=None)
    assert "The results of plain are not shown: they do not say of which weights" in text_of(
        runs, tmp_path / "page.html"
    )


def test_what_the_numbers_are_of_stands_under_every_table_of_them(runs, tmp_path):
    for run in runs:
        change(run, protocol="2,048 samples, inception, against VIRTUAL.npz: statistics of the file for FD and sFD")
        origin = {"protocol": "9 reconstructions by codec against their originals in val, inception"}
        (run / "reconstruction.json").write_text(json.dumps({"rFD(inception)": 1.0, "origin": origin}))
    text = text_of(runs, tmp_path / "page.html")
    line = "Protocol: 2,048 samples, inception, against VIRTUAL.npz: statistics of the file for FD and sFD."
    assert text.count(line) == 3 and text.count("9 reconstructions by codec against their originals in val") == 1
    change(runs[1], protocol="2,048 samples, inception, against there/VIRTUAL.npz")
    text = text_of(runs, tmp_path / "page.html")
    assert text.count("Protocol of rear: 2,048 samples, inception, against there/VIRTUAL.npz.") == 3
    assert "Protocol of plain: 2,048 samples" in text


def test_validation_on_other_held_out_data_is_told(runs, tmp_path):
    """By content where that is known, else by name."""
    said = "Validation is not of the same held-out data"
    assert said not in text_of(runs, tmp_path / "page.html")
    config = json.loads((runs[1] / "config.json").read_text())
    config["data"] |= {"images": "mine", "validation_items": 500}
    (runs[1] / "config.json").write_text(json.dumps(config))
    text = text_of(runs, tmp_path / "page.html")
    assert f"{said} and tokens, and does not compare: plain None; rear up to 500 of mine." in text
    (runs[0] / "config.json").write_text(json.dumps(config | {"data": config["data"] | {"images": "moved"}}))
    for known, expected in (((0, 0), False), ((0, 1), True)):
        for run, index in zip(runs, known, strict=True):
            (run / "origin.json").write_text(json.dumps({"validation_sha256": "ab"[index]}))
        assert (said in text_of(runs, tmp_path / "page.html")) == expected


def test_results_whose_model_was_not_kept_are_shown(runs, tmp_path):
    (runs[1] / "model" / "model.safetensors").unlink()
    assert load_runs(runs)[1].results.rows


@pytest.mark.parametrize(("entries", "why"), [
    ({"reference": {"name": "mine", "train_sha256": "a"}}, "against another reference"),
    ({"feature_network": {"name": "efficientnet-lite0", "sha256": "b"}}, "with another feature network"),
    ({"_num_samples": 512}, "they are of 512 samples, those of 2,048, and a Fréchet distance depends on that"),
    ({"config": {"num_neighbours": 3, "draws": 4}}, "with other draws"),
    ({"config": {"num_neighbours": 3, "draws": 2, "precision": "bf16"}}, "with other precision"),
    ({"config": {"num_neighbours": 3, "draws": 2, "density_neighbours": 9}}, "with other density_neighbours"),
])  # fmt: skip
def test_numbers_that_were_measured_otherwise_are_not_compared(runs, entries, why):
    alike = {
        "reference": {"name": "mine", "train_sha256": "0"},
        "feature_network": {"name": "efficientnet-lite0", "sha256": "a"},
        "config": {"num_neighbours": 3, "draws": 2},
    }
    for run in runs:
        change(run, **alike)
    change(runs[0], config=alike["config"] | {"precision": "fp32"})  # which older versions had without a word
    assert all(run.results.rows for run in load_runs(runs))
    change(runs[1], **entries)
    first, second = load_runs(runs)
    assert first.results.rows and not second.results.rows and why in second.withheld[0]
    assert "The results of rear are not shown beside those of plain: they" in second.withheld[0]
    assert load_runs(runs[1:])[0].results.rows  # alone there is nothing to compare it with


def test_one_reference_by_two_names_is_one(runs):
    for run, name in zip(runs, ("here", "there"), strict=True):
        change(run, reference={"name": name, "num_train": 9, "train_sha256": "a"})
    assert all(run.results.rows for run in load_runs(runs))


def test_a_row_at_the_entropy_of_a_run_that_changed_since_is_not_shown(runs):
    sha256 = file_sha256(runs[1] / "model" / "model.safetensors")
    content = json.loads((runs[0] / "results.json").read_text())
    content["rows"][1] |= {"matched_to": "rear", "matched_sha256": sha256}
    (runs[0] / "results.json").write_text(json.dumps(content | {"best": 1}))
    assert len(load_runs(runs)[0].results.rows) == 2
    (runs[1] / "model" / "model.safetensors").write_text("trained on")
    change(runs[1], checkpoint_sha256=file_sha256(runs[1] / "model" / "model.safetensors"))
    plain, _ = load_runs(runs)
    assert [row.temperature for row in plain.results.rows] == [1.0] and plain.results.best is None
    assert plain.withheld[0].startswith("Rows of plain at the entropy of rear are not shown")


def test_pictures_that_are_not_those_that_were_measured_are_refused(runs):
    path = runs[0] / "samples_t1.0.npz"
    content = json.loads((runs[0] / "results.json").read_text())
    content["rows"][0]["samples_sha256"] = file_sha256(path)
    (runs[0] / "results.json").write_text(json.dumps(content))
    assert load_runs(runs)
    path.write_bytes((runs[1] / "samples_t0.9.npz").read_bytes() + b" ")
    with pytest.raises(
        UserError, match=r"t1.0.npz is not the file that rows\[0\] measured; evaluate again with --over"
    ):
        load_runs(runs)


def test_reconstructions_are_of_the_tokenizer_that_is_there(tmp_path):
    run = write_run(tmp_path / "tokenizer", config={"objective": {"kind": "reconstruction"}})
    (run / "metrics.jsonl").write_text('{"step": 5, "time": 1.0, "train/mse": 0.1}\n')
    (run / "model").mkdir()
    weights = run / "model" / "model.safetensors"
    weights.write_text("first")
    origin = {"checkpoint_sha256": file_sha256(weights)}
    (run / "reconstruction.json").write_text(json.dumps({"psnr": 20.25, "origin": origin}))
    assert load_runs([run])[0].reconstruction == {"psnr": 20.25} and "20.25" in text_of([run], tmp_path / "page.html")
    origin |= {"protocol": "9 reconstructions", "remarks": ["of few images"]}
    (run / "reconstruction.json").write_text(json.dumps({"psnr": 20.25, "origin": origin}))
    assert "9 reconstructions; of few images" in text_of([run], tmp_path / "page.html")
    weights.write_text("trained on")
    text = text_of([run], tmp_path / "page.html")
    assert "The reconstructions of tokenizer are not shown: they are of weights that have changed" in text
    assert "20.25" not in text and "What the tokenizer keeps" not in text


def test_the_page_says_what_must_be_known_to_read_the_numbers(runs, tmp_path):
    write_results(runs[1], {1.0: 58.75})
    change(runs[1], checkpoint_sha256=file_sha256(runs[1] / "model" / "model.safetensors"))
    for run in runs:
        change(run, remarks=["FD(x) is biased upwards by few samples"])
    text = text_of(runs, tmp_path / "page.html")
    assert text.count("FD(x) is biased upwards by few samples.") == 1
    assert "measured at different temperatures, and the best is the best of these: plain 0.9 and 1; rear 1." in text
