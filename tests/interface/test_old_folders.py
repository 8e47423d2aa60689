"""Folders written before the house was rebuilt are still read, measured, shown and gone on with."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from consonar import cli
from consonar.components import load_generator, load_own_tokenizer, load_tokenizer
from consonar.config_io import from_dict
from consonar.data.tokens import TokenStore
from consonar.networks.discriminator import load_discriminator
from consonar.training.checkpoints import list_resume
from consonar.training.config import TrainConfig
from consonar.training.run import train

ARCHIVE = Path(__file__).parents[1] / "old" / "folders.tar.xz"
MADE_AT = "/tmp/old/old"


@pytest.fixture
def old(tmp_path: Path, monkeypatch) -> Path:
    """The folders, as if they had been made where they lie now."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text().replace(MADE_AT, str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_models_and_tokens_are_loaded(old: Path) -> None:
    for name in ("rear", "vapi", "vapi/best", "converted"):
        assert load_generator(old / name).vocab_size == 16
    assert load_generator(old / "rear").origin.class_names == ("cat", "dog")
    assert load_own_tokenizer(old / "rear").fingerprint == load_tokenizer(old / "tokenizer").fingerprint
    assert len(TokenStore.open("tokens")) == 12 and len(TokenStore.open("tokens-validation")) == 6
    assert load_discriminator(old / "tokenizer")(torch.zeros(1, 3, 16, 16)).shape[1] == 1


@pytest.mark.parametrize("name", ["stopped", "vapi-stopped"])
def test_runs_that_were_stopped_are_gone_on_with(old: Path, name: str) -> None:
    stored = json.loads((old / name / "config.json").read_text())
    config = from_dict(stored, name, TrainConfig)
    train(config, old / name, resume=True, quiet=True)
    assert list_resume(old / name / "checkpoints")[-1].name == "step_00000004.pt"
    assert load_generator(old / name).num_tokens == 64


def test_runs_are_shown_and_measured_again(old: Path, quarters, capsys) -> None:
    cli.main(["report", "rear", "vapi", "--out", "page.html"])
    page = Path("page.html").read_text()
    assert "reAR" in page and "VA-pi" in page and "not shown" not in page
    known = ["--reference", "images", "--feature-network", "quarters", "--device", "cpu"]
    cli.main(["evaluate", "rear", *known, "--num-samples", "16", "--draws", "2", "--overwrite"])
    cli.main(["evaluate", "samples.npz", *known, "--draws", "1"])
    assert "copy rate (features)" in capsys.readouterr().out


def test_a_converted_folder_goes_the_way_back(old: Path) -> None:
    cli.main(["convert", "converted", "--to-official", "back.pt"])
    back, first = (torch.load(old / name, weights_only=True)["model"] for name in ("back.pt", "released.pt"))
    assert back.keys() == first.keys() and all(torch.equal(back[key], first[key]) for key in first)
