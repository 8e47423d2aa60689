"""Pictures that cannot be read: what is left out is counted and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_VQ, Pictures, picture

from consonar import cli
from consonar.data import loader
from consonar.data.bad_images import BadImages, leave_out
from consonar.data.image_folder import ImageFolder
from consonar.data.tokens import TokenStore
from consonar.errors import BadImage, UserError
from consonar.training import run as runs
from consonar.training.config import DataConfig, TrainConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.tracking import read_metrics


def fill(folder: Path, count: int, *broken: int) -> Path:
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def fails(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.fixture
def reconstruct(make_config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """A run that trains a tokenizer on these images."""

    def make(images: Path, steps: int = 3, **data: object) -> TrainConfig:
        return make_config(
            tokenizer=None, model=TINY_VQ, objective=ReconstructionConfig(perceptual_weight=0),
            data=DataConfig(images=str(images), **data), loop={"steps": steps, "save_every": 1},
        )  # fmt: skip

    return make


def test_tokenize_leaves_out_what_cannot_be_read_and_lists_it(tmp_path, tokenizer_folder, capsys):
    data = fill(tmp_path / "data", 8, 3)
    argv = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(data), "--out", str(tmp_path / "t")]
    argv += ["--validation-split", "0%"]
    line = fails(argv, capsys)
    assert "b/003.png: the image is truncated" in line and "--bad-images skip leaves such images out" in line
    assert not (tmp_path / "t").exists()
    cli.main([*argv, "--bad-images", "skip"])
    said = capsys.readouterr().out
    assert "1 of 8 pictures cannot be read and are left out" in said and "7 images" in said
    listed = (tmp_path / "t-bad-images.txt").read_text().splitlines()
    assert listed[0] == "train\t8\tpictures" and len(listed) == 2 and "003.png: the image is truncated" in listed[1]
    store = TokenStore.open(tmp_path / "t")
    assert store.labels.tolist() == [0, 0, 0, 0, 1, 1, 1], "labels stay with their pictures"
    assert "exists" in fails([*argv, "--bad-images", "skip"], capsys)


def test_beyond_the_limit_skipping_stops(tmp_path, tokenizer_folder, capsys):
    data = fill(tmp_path / "data", 10, 3, 4, 5)
    argv = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(data), "--out", str(tmp_path / "t")]
    argv += ["--validation-split", "0%"]
    skip = ["--bad-images", "skip"]
    assert "2 of 10 pictures cannot be read, more than the share of 0.01" in fails([*argv, *skip], capsys)
    assert "3 of 10" in fails([*argv, *skip, "--bad-images-limit", "0.2"], capsys)
    cli.main([*argv, *skip, "--bad-images-limit=0.3"])
    assert len(TokenStore.open(tmp_path / "t")) == 7
    for wrong in (["--bad-images", "maybe"], [*skip, "--bad-images-limit", "2"], ["--bad-images-limit", "0.5"]):
        assert "--bad-images" in fails([*argv, *wrong], capsys)


def test_a_folder_of_which_nothing_can_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the 2 train images can be read"):
        leave_out(ImageFolder(fill(tmp_path, 2, 0, 1)), BadImages("skip", 1.0), "train")


def test_rows_and_labels_of_a_part_are_those_of_the_source(tmp_path):
    source = ImageFolder(fill(tmp_path, 9, 2))
    bad = BadImages("skip")
    part = leave_out(source, bad, "train")
    assert [record.name for record in part] == [
        source.read(row).name for row in range(9) if row not in bad.found["train"]
    ]
    assert part.labels == [record.label for record in part] and part.content_hash != source.content_hash


class Broken(Pictures):
    """A stream with two pictures that cannot be read."""

    def __iter__(self):
        def read(record):
            if record.name in ("picture 1", "picture 4"):
                raise BadImage(f"{record.name}: damaged")
            return record

        return map(read, super().__iter__())


def test_a_stream_goes_on_behind_a_bad_picture():
    bad = BadImages("skip", 0.1)
    source = leave_out(Broken(6), bad, "train")
    assert [record.name for record in source] == [f"picture {i}" for i in (0, 2, 3, 5)]
    assert bad.note == "2 of 6 pictures cannot be read and are left out: picture 1: damaged; picture 4: damaged"
    with pytest.raises(BadImage, match="picture 1"):
        list(leave_out(Broken(6), BadImages("stop"), "train"))


@pytest.mark.parametrize("memory", [4e9, 0])
def test_a_run_that_skips_is_resumed_exactly_and_looks_at_nothing_twice(memory, tmp_path, reconstruct, monkeypatch):
    monkeypatch.setattr(loader, "MAX_MEMORY", memory)
    for split, broken in (("train", 5), ("validation", 2)):
        fill(tmp_path / "data" / split, 12, broken)
    config = reconstruct(tmp_path / "data", bad_images="skip")
    with pytest.raises(UserError, match="the image is truncated"):
        runs.train(reconstruct(tmp_path / "data"), tmp_path / "stops", quiet=True)
    whole = runs.train(config, tmp_path / "whole", quiet=True)
    runs.train(config, tmp_path / "parts", quiet=True, stop_at=1)
    listed = (tmp_path / "parts" / "bad-images.txt").read_text()
    assert listed.count("pictures") == 2 and listed.count("truncated or damaged") == 2
    monkeypatch.setattr("consonar.data.bad_images.BadImages.met", lambda *_: pytest.fail("checked again"))
    runs.train(config, tmp_path / "parts", quiet=True, resume=True)
    lines = [
        [{**line, "time": 0} for line in read_metrics(run / "metrics.jsonl")] for run in (whole, tmp_path / "parts")
    ]
    assert lines[0] == lines[1]


def test_evaluate_leaves_out_samples_and_references_that_cannot_be_read(tmp_path, quarters, capsys):
    samples = fill(tmp_path / "samples", 12, 3)
    for split in ("train", "validation"):
        fill(tmp_path / "reference" / split, 12, 4)
    argv = ["evaluate", str(samples), "--reference", str(tmp_path / "reference"), "--draws", "1", "--device", "cpu"]
    argv += ["--feature-network", "quarters"]
    out = tmp_path / "results.json"
    assert ".png: the image is truncated" in fails([*argv, "--out", str(out)], capsys)
    cli.main([*argv, "--out", str(out), "--bad-images", "skip"])
    assert "3 of 36 pictures cannot be read" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["num_samples"] == 11 and set(content["num_reference"].values()) == {11}
    assert (tmp_path / "results.json-bad-images.txt").read_text().count("truncated or damaged") == 3
