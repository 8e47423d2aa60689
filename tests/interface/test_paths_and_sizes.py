"""Paths as people type them, and sizes that no machine has room for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consonar import cli
from consonar.components import save_generator
from consonar.data.transforms import MAX_IMAGE_SIZE
from consonar.errors import UserError
from consonar.hub import read_name
from consonar.origin import Origin
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vq import VQConfig
from consonar.training.config import TrainConfig
from consonar.training.run import with_validation


def fails(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("size", [0, -16, 100_000])
def test_an_image_size_that_no_image_has_is_refused_at_once(size: int, tokenizer_folder, tmp_path, capsys) -> None:
    argv = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", "openmoji", "--out", str(tmp_path / "out")]
    line = fails([*argv, "--image-size", str(size)], capsys)
    assert f"--image-size: {size} is not in [1, {MAX_IMAGE_SIZE}]" in line
    for kind in (VQConfig, TiTokConfig):
        with pytest.raises(UserError, match=rf"^model\.image_size: {size} is not in \[1, {MAX_IMAGE_SIZE}\]"):
            kind(image_size=size)


def test_an_image_size_of_a_converted_file_has_the_same_bounds(tmp_path, capsys) -> None:
    from unit.released_models import released

    torch.save(released("llamagen, classes"), tmp_path / "c2i_B_256.pt")
    argv = ["convert", str(tmp_path / "c2i_B_256.pt"), "--to", str(tmp_path / "out"), "--image-size", "1600000"]
    assert "--image-size: 1600000 is not in [1, " in fails(argv, capsys)
    assert read_name("hf:o/r/x.pt@384").image_size == 384


@pytest.mark.parametrize("words", [["--data", "DATA"], ["--data=DATA"], ["--data.images=DATA"]])
def test_data_is_given_with_a_space_or_an_equals_sign(words: list[str], monkeypatch, tmp_path) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr("consonar.cli.train.train", lambda config, out, **_: given.append(config))
    cli.main(["train", "tokenizer-openmoji-64", "--out", str(tmp_path / "out"), *words])
    assert given[0].data.images == "DATA"


def test_data_given_twice_in_two_forms_is_refused(tmp_path, capsys) -> None:
    argv = ["train", "tokenizer-openmoji-64", "--out", str(tmp_path / "out"), "--data=a", "--data.images", "b"]
    assert "data.images" in fails(argv, capsys)


@pytest.mark.parametrize(
    "name, made", [("t0.9", "folder"), ("v1.2.x", "folder"), ("a.b/c", "folder"), ("x.PNG", "file")]
)
def test_a_name_with_a_dot_is_a_folder_unless_the_ending_is_a_known_one(
    name: str, made: str, tiny_generator: Callable, tokenizer_folder: Path, tmp_path: Path
) -> None:
    save_generator(tiny_generator(), tmp_path / "g", Origin(tokenizer=str(tokenizer_folder)))
    out = tmp_path / name
    cli.main(["sample", str(tmp_path / "g"), "--out", str(out), "--num-samples", "2", "--device", "cpu"])
    assert out.is_dir() == (made == "folder") and (made == "file" or len(list(out.glob("*.png"))) == 2)


@pytest.mark.parametrize("ending", [".gif", ".JPG", ".npy", ".json"])
def test_an_ending_that_samples_do_not_have_is_refused(
    ending: str, tiny_generator: Callable, tokenizer_folder: Path, tmp_path: Path, capsys
) -> None:
    save_generator(tiny_generator(), tmp_path / "g", Origin(tokenizer=str(tokenizer_folder)))
    argv = ["sample", str(tmp_path / "g"), "--out", str(tmp_path / f"a{ending}"), "--device", "cpu"]
    assert "choices: NAME.png, NAME.npz, or a folder" in fails(argv, capsys)


@pytest.mark.parametrize("out", [".", "..", "/", "x/.."])
def test_an_output_without_a_name_of_its_own_is_refused(
    out: str,
    tiny_generator: Callable,
    tokenizer_folder: Path,
    picture_folder: Path,
    tmp_path: Path,
    capsys,
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_generator(tiny_generator(), tmp_path / "g", Origin(tokenizer=str(tokenizer_folder)))
    tokenize = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(picture_folder), "--out", out]
    for argv in (tokenize, ["sample", "g", "--out", out, "--device", "cpu"]):
        line = fails(argv, capsys)
        assert "--out" in line and ("name" in line or "exists" in line)


@pytest.mark.parametrize("written", ["{}/", "{}//", "{}/.", "{}"])
def test_a_store_with_a_slash_behind_it_keeps_its_validation_store(
    written: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    for name in ("mine", "mine-validation"):
        (tmp_path / name).mkdir()
    config = make_config()
    config = replace(
        config, data=replace(config.data, tokens=written.format(tmp_path / "mine"), validation_tokens=None)
    )
    assert with_validation(config).data.validation_tokens == str(tmp_path / "mine-validation")


NOT_UTF8 = "out\udcff"


@pytest.mark.parametrize(
    "argv",
    [
        ["tokenize", "--tokenizer", "openmoji-64", "--data", "PICTURES", "--out", NOT_UTF8],
        ["train", "ar-openmoji", "--out", NOT_UTF8],
        ["sample", "openmoji", "--out", NOT_UTF8],
        ["report", "run", "--out", NOT_UTF8],
        ["evaluate", "PICTURES", "--reference", "openmoji", "--out", NOT_UTF8],
        ["convert", "x.pt", "--to", NOT_UTF8],
        ["import-tokens", "--format", "rar-jsonl", "--data", "x", "--tokenizer", "openmoji-64", "--out", NOT_UTF8],
    ],
)
def test_an_output_whose_name_is_not_utf8_is_refused(argv: list[str], picture_folder: Path, tmp_path, capsys) -> None:
    line = fails([str(picture_folder) if word == "PICTURES" else word for word in argv], capsys)
    assert "is not UTF-8" in line and line.encode()


def test_a_name_that_only_this_locale_cannot_spell_says_so(tmp_path) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-m", "consonar", "sample", "openmoji", "--out", str(tmp_path / "ñ.npz")]
    ended = subprocess.run(argv, capture_output=True, text=True, env=ascii_only)
    assert ended.returncode == 2 and "names are ascii under this locale" in ended.stderr, ended.stderr
    assert "PYTHONUTF8=1" in ended.stderr and "not UTF-8" not in ended.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["tokenize", "--tokenizer", "openmoji-64", "--data", "openmoji", "--out"],
        ["train", "ar-openmoji", "--out"],
        ["sample", "openmoji", "--num-samples", "1", "--out"],
        ["report", "run", "--out"],
        ["evaluate", "x.npz", "--reference", "openmoji", "--out"],
        ["convert", "x.pt", "--to"],
        ["convert", "model", "--to-official"],
        ["demo", "--out"],
    ],
)
def test_an_output_at_a_link_that_leads_nowhere_is_refused_and_the_link_stays(argv, tmp_path, capsys) -> None:
    links = {tmp_path / "away.npz": tmp_path / "unplugged" / "s.npz", tmp_path / "loop": "loop"}
    for link, target in links.items():
        link.symlink_to(target)
        for place in (link, link / "below.npz"):
            line = fails([*argv, str(place)], capsys)
            assert f"{argv[-1]}: {link} is a link to {target}, which is not there" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away.npz", "loop"]
    assert all(path.is_symlink() for path in tmp_path.iterdir())
