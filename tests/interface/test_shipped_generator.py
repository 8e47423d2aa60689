"""A generator that is part of the package is used by its name: no training, no folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consonar import cli, model_folders
from consonar.components import load_generator, load_own_tokenizer, model_folder, read_origin, save_generator
from consonar.errors import UserError
from consonar.model_folders import SHIPPED
from consonar.origin import Origin
from consonar.training.origins import resolve_start


@pytest.fixture
def shipped(tiny_generator, tokenizer, tokenizer_folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A tiny generator in the place of the shipped `openmoji`, in half precision."""
    names = ("Animals", "Food & Drink", "tench, Tinca tinca")
    origin = Origin(tokenizer=str(tokenizer_folder), tokenizer_fingerprint=tokenizer.fingerprint, class_names=names)
    save_generator(tiny_generator(), tmp_path / "generators" / "pretrained" / "openmoji", origin, dtype="float16")
    monkeypatch.setattr(model_folders, "PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "generators" / "pretrained" / "openmoji"


def test_a_shipped_generator_is_loaded_by_its_name(shipped: Path, tokenizer) -> None:
    generator = load_generator("openmoji")
    assert all(value.dtype.itemsize == 4 for value in generator.state_dict().values())
    assert load_own_tokenizer("openmoji").fingerprint == tokenizer.fingerprint
    assert read_origin("openmoji").class_names == ("Animals", "Food & Drink", "tench, Tinca tinca")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("0,2", [0, 2]), ("food & drink", [1]), ("Animals,1, food & drink", [0, 1, 1]), ("tench, Tinca tinca", [2])],
)
def test_classes_are_ids_or_names(shipped: Path, classes: str, labels: list[int]) -> None:
    cli.main(["sample", "openmoji", "--classes", classes, "--out", "samples.npz", "--device", "cpu"])
    with np.load("samples.npz") as arrays:
        assert arrays["labels"].tolist() == labels
        assert json.loads(str(arrays["settings"]))["generator"] == "openmoji"


def test_an_unknown_class_name_is_refused_with_the_names(shipped: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "openmoji", "--classes", "Fod & Drink", "--out", "s.png"])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "did you mean 'Food & Drink'" in error and "'Fod & Drink'" in error and "0..2" in error
    )
    assert not Path("s.png").exists()


def test_training_starts_from_a_shipped_generator_by_its_name(shipped: Path, make_config) -> None:
    config = resolve_start(make_config(init="openmoji", tokenizer=None))
    assert config.init == "openmoji" and config.tokenizer == read_origin("openmoji").tokenizer


def test_an_unknown_generator_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"unknown 'openmoij' \(did you mean 'openmoji'\?.*run folder"):
        load_generator("openmoij")


def test_a_folder_of_the_same_name_is_meant_by_its_path(shipped: Path, tiny_generator) -> None:
    save_generator(tiny_generator(num_layers=3), Path("openmoji"), Origin())
    assert load_generator("openmoji").num_layers == 2 and load_generator("./openmoji").num_layers == 3


def test_measuring_a_shipped_generator_names_the_way(shipped: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "openmoji", "--reference", "openmoji-64", "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "consonar sample openmoji --num-samples 2048 --out openmoji.npz" in error
    assert sorted(path.name for path in shipped.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", SHIPPED["generator"])
def test_every_shipped_generator_is_there_small_and_fits_its_tokenizer(name: str) -> None:
    generator, tokenizer = load_generator(name), load_own_tokenizer(name)
    assert (generator.vocab_size, generator.num_tokens) == (tokenizer.vocab_size, tokenizer.num_tokens)
    assert len(read_origin(name).class_names or ()) == generator.num_classes
    folder = model_folder(name)
    assert (folder / "README.md").is_file()
    assert (folder / "model.safetensors").stat().st_size <= 12e6
