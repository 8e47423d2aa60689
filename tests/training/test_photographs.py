"""The study on photographs, with a toy grid: from pictures to the section of the page, killed and gone on with."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import picture
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from consonar.data.cifar10 import CLASS_NAMES
from consonar.errors import UserError
from consonar.records import device_of
from consonar.sweeps import work
from consonar.sweeps.rows import read_sweep

CLAIMS = Path(__file__).parents[2] / "claims"
TINY = {
    "model.width": 16, "model.num_layers": 2, "model.num_heads": 2, "data.validation_items": 0, "loop.steps": 2,
    "loop.validate_every": 1, "loop.batch_size": 8, "loop.precision": "fp32", "loop.device": "cpu",
    "data.tokens": "runs/photographs/tokens",
}  # fmt: skip


def save_copy(folder, first=0):
    """A small copy of CIFAR-10."""
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(CLASS_NAMES))})
    folder.mkdir()
    for split, count in (("train", 40), ("test", 30)):
        columns = {
            "img": [picture(first + row, 32) for row in range(count)],
            "label": [row % 10 for row in range(count)],
        }
        Dataset.from_dict(columns, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def study(tmp_path, monkeypatch, quarters):
    """The script, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("photographs", CLAIMS / "photographs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    save_copy(tmp_path / "whole")
    rows = {
        "plain": {"base": "ar-cifar10", **TINY},
        "rear": {"base": "rear-cifar10", "objective.head_width": 8, **TINY},
        "plain+ce": {"base": "ce-cifar10", "init": {"cell": "plain", "seed": 0}, "objective.rewards": {"mse": 1.0},
                     "data.images": "cifar10:runs/photographs/data", "data.validation_items": 0, "loop.steps": 1,
                     "loop.batch_size": 8, "loop.precision": "fp32", "loop.device": "cpu"},
        "guided": {"base": "ar-cifar10", "seeds": 1, "evaluate": {"sampler": {"guidance_scale": 2.0}}, **TINY},
    }  # fmt: skip
    evaluated = {"reference": "cifar10:runs/photographs/data", "feature_network": "quarters", "temperatures": [1, 0.7],
                 "num_samples": 12, "draws": 2, "reconstruct": False}  # fmt: skip
    (tmp_path / "claims").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("# Results\n\nBefore.\n")
    (tmp_path / "claims" / "photographs.yaml").write_text(yaml.safe_dump({
        "seeds": 2, "rows": rows, "evaluate": evaluated,
    }, sort_keys=False))  # fmt: skip
    monkeypatch.setattr(module, "HERE", tmp_path / "claims")
    monkeypatch.setattr(module, "PART", {"train": 20, "test": 12})
    monkeypatch.setattr(module, "PERTURBED", 8)
    monkeypatch.setattr(module, "FD", "FD(quarters)")
    monkeypatch.setattr(module, "COLUMNS", tuple(c.replace("efficientnet-lite0", "quarters") for c in module.COLUMNS))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONSONAR_CIFAR10", str(tmp_path / "whole"))
    monkeypatch.setattr(sys, "argv", ["photographs.py"])
    monkeypatch.chdir(tmp_path)
    return module


def test_the_study_goes_on_where_it_was_killed_and_writes_what_is_there(study, tmp_path, monkeypatch):
    real, trained = work.train, []

    def kill(config, run, **options):
        trained.append(run.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(config, run, **options)

    monkeypatch.setattr(work, "train", kill)
    with pytest.raises(KeyboardInterrupt):
        study.main()
    results = tmp_path / "claims" / "results" / "photographs" / "results"
    assert sorted(path.stem for path in results.iterdir()) == ["plain-0", "rear-0"]
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--page"])
    study.main()
    text = (tmp_path / "docs" / "results.md").read_text()
    assert (
        "**2 of 7 runs have a result**" in text and "Decoded from true tokens" in text and "plain+ce (2 of 2)" in text
    )
    assert (
        "one seed, open" in text
        and text.startswith("# Results\n\nBefore.\n")
        and trained == ["plain-0", "rear-0", "plain+ce-0"]
    )

    def note(config, run, **options):
        trained.append(run.name)
        return real(config, run, **options)

    monkeypatch.setattr(work, "train", note)
    monkeypatch.setattr(sys, "argv", ["photographs.py"])
    study.main()
    assert trained[3:] == ["plain+ce-0", "guided-0", "plain-1", "rear-1", "plain+ce-1"]
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "**7 of 7 runs have a result**" in text and text.count("<!-- photographs -->") == 1
    assert (
        "plain+ce (" not in text.partition("### ")[0]
        and "| plain+ce" in text
        and "reAR beats plain AR | 3.02 → 1.86 | rear − plain" in text
    )
    guided, plain = (json.loads((results / f"{row}-0.json").read_text()) for row in ("guided", "plain"))
    assert guided["weights"] == plain["weights"] and list(plain["validations"]) == ["1", "2"]
    assert guided["results"]["rows"][0]["guidance_scale"] == 2 and plain["results"]["rows"][0]["guidance_scale"] == 1
    assert guided["results"]["rows"][0]["metrics"] != plain["results"]["rows"][0]["metrics"]


def test_pictures_and_tokens_of_another_copy_are_refused(study, tmp_path, monkeypatch, capsys):
    place = tmp_path / "runs" / "photographs"

    def refused(words):
        with pytest.raises(SystemExit, match="2"):
            study.main()
        said = capsys.readouterr().err.splitlines()[-1]  # after the progress of the library
        assert re.fullmatch(f"{words}; move runs/photographs away, or name those", said)

    def make_parts():
        for split, count in study.PART.items():
            study.make_part(split, count, Path("runs/photographs/data") / f"{split}-00000-of-00001.parquet")

    make_parts()
    source = study.open_source("cifar10:runs/photographs/data", split="train", image_size=32)
    study.make_store(Path("runs/photographs/tokens"), source, study.load_tokenizer("cifar10-32"), "center_flip")
    make_parts()  # the same copy
    save_copy(tmp_path / "png", first=100)
    monkeypatch.setenv("CONSONAR_CIFAR10", str(tmp_path / "png"))
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--out", "other"])
    refused(r"runs/photographs/data: is of other pictures than .*/png \(CONSONAR_CIFAR10\) has")
    shutil.rmtree(place / "data")
    refused(r"runs/photographs/tokens: is of other pictures than cifar10\[train\] has")
    monkeypatch.delenv("CONSONAR_CIFAR10")
    monkeypatch.setattr(study, "open_source", unreachable)
    make_parts()
    assert "not compared with the copy of the hub (the hub cannot be reached)" in capsys.readouterr().out


def unreachable(name, **options):
    raise UserError("the hub cannot be reached")


@pytest.mark.parametrize("name", ["photographs", "text"])
def test_tokens_and_forgiveness_are_made_on_the_device(name, study, cuda, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    module, seen = study if name == "photographs" else importlib.import_module("text"), []

    def diagnose(tokenizer, reference, settings, **options):
        seen.append(settings.device)
        return SimpleNamespace(content=dict)

    monkeypatch.setattr(study, "diagnose", diagnose)
    monkeypatch.setattr(module, "open_source", lambda *given, **options: None)

    def make_store(path, source, tokenizer, *views):
        seen.append(str(device_of(tokenizer)))

    monkeypatch.setattr(module, "make_store", make_store)
    sweep = read_sweep(tmp_path / "claims" / "photographs.yaml", tmp_path / "out")
    (tmp_path / "out").mkdir()
    module.prepare("gpu", sweep, tmp_path / "out")
    assert seen == ["cuda:0"] * (3 if name == "photographs" else 2)


def test_runs_without_a_number_and_results_elsewhere_have_their_page(study, tmp_path, monkeypatch):
    sweep = read_sweep(tmp_path / "claims" / "photographs.yaml", tmp_path / "other")
    failed = {name: {"failure": "the loss is not finite"} for name in sweep.cells}
    text = study.page("photographs", sweep, failed, tmp_path / "other")
    assert "None of its runs ended with a number." in text and "- plain-0 failed: the loss is not finite." in text
    curves = {"plain-0": {}, "plain-1": {"5": None}}
    results = {name: {"failure": None, "validations": curve} for name, curve in curves.items()}
    summary = study.part_of(sweep, {}, ["plain"], "plain")
    assert study.loss_cells(summary, "plain", results) == ["–"] * 3
    results["plain-1"]["validations"] |= {"6": 2.0, "7": 3.0}
    assert study.loss_cells(summary, "plain", results) == ["3", "2", "6"]
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--page", "--out", "other"])
    study.main()
    assert "**0 of 7 runs have a result** (`other/results`)" in (tmp_path / "docs" / "results.md").read_text()


@pytest.mark.parametrize("name", ["photographs", "photographs-gpu"])
def test_both_profiles_have_the_rows_that_the_page_speaks_of(study, name, tmp_path):
    sweep = read_sweep(CLAIMS / f"{name}.yaml", tmp_path)
    assert {row for _, _, *pair in study.ARTICLES for row in pair} <= set(sweep.rows)
    assert {base for _, base in study.GROUPS.values()} <= set(sweep.rows)
    of_group = {names: [row for row in sweep.rows if re.fullmatch(names, row)] for names, _ in study.GROUPS.values()}
    assert sorted(row for rows in of_group.values() for row in rows) == sorted(sweep.rows)
    updates = {cell.row: cell.config.loop.steps for cell in sweep.cells.values()}
    for names, base in study.GROUPS.values():
        assert "+" not in base or {updates[row] for row in of_group[names]} == {updates[base]}
    seeds = {row: sum(cell.row == row for cell in sweep.cells.values()) for row in sweep.rows}
    assert all(seeds[row] == (3 if "+" in row else 2) for row in sweep.rows)
