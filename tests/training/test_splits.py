"""Data sets have the splits they have: what is validated on is the same in every command, and known before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import NUM_CLASSES, TINY_VQ, Pictures, picture
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature

from consonar import cli
from consonar.components import save_generator
from consonar.data.image_folder import ImageFolder
from consonar.data.sources import called_in, open_source
from consonar.data.splits import HELD_OUT, hold_out, open_splits
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.evaluation.inputs import open_reference
from consonar.files.readers import read_json
from consonar.origin import Origin
from consonar.training.config import DataConfig
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.controls import CrossEntropyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics


def fill(folder: Path, count: int, first: int = 0) -> Path:
    for index in range(first, first + count):
        path = folder / "abc"[index % NUM_CLASSES] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    return folder


def table(count: int, first: int = 0) -> Dataset:
    rows = range(first, first + count)
    columns = {"img": [picture(row) for row in rows], "label": [row % NUM_CLASSES for row in rows]}
    return Dataset.from_dict(columns, Features({"img": ImageFeature(), "label": ClassLabel(names=[*"abc"])}))


@pytest.fixture
def every_form(tmp_path, monkeypatch):
    """One data set of 24 pictures to train on and 6 to test on, in every form."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    fill(tmp_path / "folder" / "train", 24)
    fill(tmp_path / "folder" / "test", 6, 100)
    sets = DatasetDict(train=table(24), test=table(6, 100))
    sets.save_to_disk(tmp_path / "saved")
    for name, part in sets.items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
    return {
        "imagefolder": f"{tmp_path}/folder", "arrow": f"arrow:{tmp_path}/saved", "hf": f"hf:{tmp_path}/parquet",
        "hf-stream": f"hf-stream:{tmp_path}/parquet",
    }  # fmt: skip


def fails(argv: list[object], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def pixels(source) -> list[bytes]:
    return [np.asarray(record.image).tobytes() for record in source]


@pytest.mark.parametrize("form", ["imagefolder", "arrow", "hf", "hf-stream"])
def test_test_is_validated_on_where_nothing_is_called_validation(form, every_form):
    spec, expected = every_form[form], [np.asarray(picture(row)).tobytes() for row in range(100, 106)]
    splits = open_splits(spec, key="k", image_size=16)
    assert sorted(pixels(splits.validation)) == sorted(expected) and len(pixels(splits.train)) == 24
    assert splits.validation.name.endswith("[test]") and splits.train.name.endswith("[train]")
    assert open_splits(spec, "test", key="k", image_size=16).validation.name == splits.validation.name
    assert {*open_reference(spec, 16).images} == {"train", "validation"}


@pytest.mark.parametrize("form", ["imagefolder", "arrow", "hf", "hf-stream"])
def test_a_split_that_is_not_there_is_said_before_pictures_are_read(form, every_form, monkeypatch):
    for name in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(f"datasets.{name}", lambda *_, **__: pytest.fail("pictures were read"))
    monkeypatch.setattr(ImageFolder, "__init__", lambda *_: pytest.fail("pictures were looked for"))
    with pytest.raises(
        UserError, match=r"^data\.x: .* has no split 'holdout'; choices: test, a share of train such as"
    ):
        open_splits(every_form[form], "holdout", key="data.x", image_size=16)
    with pytest.raises(UserError, match=r"^data\.x: 'train' is what is trained on; name another split"):
        open_splits(every_form[form], "train", key="data.x", image_size=16)


def test_of_one_split_a_part_is_held_out_the_same_in_every_command(
    tmp_path, make_config, tokenizer_folder, tiny_generator, capsys
):
    data = fill(tmp_path / "data", 40)
    tokens = ["tokenize", "--tokenizer", tokenizer_folder, "--data", data, "--device", "cpu"]
    cli.main([str(word) for word in [*tokens, "--out", tmp_path / "t"]])
    assert "validation: 2 pictures, 3 classes (a … c)" in " ".join(capsys.readouterr().out.split())
    stores = [TokenStore.open(tmp_path / name) for name in ("t", "t-validation")]
    names = [set(store.table.column("name").to_pylist()) for store in stores]
    assert len(names[1]) == round(HELD_OUT * 40) and not names[0] & names[1] and len(names[0] | names[1]) == 40

    images = DataConfig(images=str(data))
    codec = make_config(
        tokenizer=None, model=TINY_VQ, objective=ReconstructionConfig(perceptual_weight=0), data=images,
        loop={"steps": 1}, seed=7,
    )  # fmt: skip
    save_generator(tiny_generator(), tmp_path / "g", Origin(tokenizer=str(tokenizer_folder)))
    aligned = make_config(
        init=str(tmp_path / "g"), tokenizer=None, model=None, loop={"steps": 1, "batch_size": 4}, data=images,
        objective=CrossEntropyConfig(rewards={"mse": 1.0}, guard=GuardConfig(measure_kl=False)),
    )  # fmt: skip
    reference = ["--reference", data, "--device", "cpu", "--feature-network", "efficientnet-lite0"]
    for name, config in (("codec", codec), ("aligned", aligned)):
        train(config, tmp_path / name, quiet=True)
        origin = read_json(tmp_path / name / "origin.json")
        assert origin["data_sha256"] == origin["pictures_sha256"] == stores[0].origin.pictures_sha256
        assert origin["validation_sha256"] == stores[1].metadata.source_sha256
        assert any("validation/" in key for line in read_metrics(tmp_path / name / "metrics.jsonl") for key in line)
    cli.main(["evaluate", *map(str, [tmp_path / "codec", *reference])])
    measured = read_json(tmp_path / "codec" / "reconstruction.json")
    assert measured["num_images"] == 2 and measured["origin"]["images"] == stores[1].source


def test_tokenize_makes_the_split_that_is_named(tmp_path, tokenizer_folder, every_form, capsys):
    argv = [
        "tokenize",
        "--tokenizer",
        tokenizer_folder,
        "--device",
        "cpu",
        "--data",
        every_form["imagefolder"],
        "--out",
    ]
    cli.main([str(word) for word in [*argv, tmp_path / "one", "--split", "validation"]])
    assert TokenStore.open(tmp_path / "one").source.endswith("[test]")
    cli.main([str(word) for word in [*argv, tmp_path / "share", "--validation-split", "25%"]])
    assert [len(TokenStore.open(tmp_path / name)) for name in ("share", "share-validation")] == [18, 6]
    cli.main([str(word) for word in [*argv, tmp_path / "all", "--validation-split", "0%"]])
    assert len(TokenStore.open(tmp_path / "all")) == 24 and not (tmp_path / "all-validation").exists()
    cli.main([str(word) for word in [*argv, tmp_path / "test", "--split", "test"]])
    assert len(TokenStore.open(tmp_path / "test")) == 6
    wrong = fails([*argv, tmp_path / "x", "--validation-split", "dev"], capsys)
    assert "--validation-split: " in wrong and "has no split 'dev'; choices: test, a share of train" in wrong
    assert "has no 'dev'" in fails([*argv, tmp_path / "x", "--split", "dev"], capsys)
    left = [*argv, tmp_path / "x", "--split", "validation", "--validation-split", "0%"]
    assert "no picture of" in fails(left, capsys)
    assert "is read only for the splits" in fails(
        [*argv, tmp_path / "x", "--split", "test", "--validation-split", "5%"], capsys
    )


@pytest.mark.parametrize("folder", ["validation", "val", "test"])
def test_pictures_to_validate_on_are_tokenised_without_any_to_train_on(folder, tmp_path, tokenizer_folder):
    fill(tmp_path / "data" / folder, 6)
    argv = ["tokenize", "--tokenizer", tokenizer_folder, "--device", "cpu", "--data", tmp_path / "data"]
    cli.main([str(word) for word in [*argv, "--split", "validation", "--out", tmp_path / "t"]])
    assert len(TokenStore.open(tmp_path / "t")) == 6


def test_samples_are_compared_with_a_share_that_is_held_out(tmp_path, quarters, capsys):
    argv = ["evaluate", fill(tmp_path / "samples", 12), "--reference", fill(tmp_path / "data", 20), "--draws", 1]
    argv += ["--device", "cpu", "--feature-network", "quarters", "--out", tmp_path / "r.json"]
    cli.main([str(word) for word in [*argv, "--validation-split", "25%"]])
    assert json.loads((tmp_path / "r.json").read_text())["num_reference"] == {"train": 15, "validation": 5}
    assert [*open_reference(tmp_path / "data", 16).images] == ["reference"]
    assert "--validation-split: " in fails([*argv, "--overwrite", "--validation-split", "test"], capsys)


def test_what_is_held_out_is_drawn_alike_every_time_and_never_trained_on(tmp_path):
    source = ImageFolder(fill(tmp_path, 20))
    splits = hold_out(source, 0.25, "k")
    rows, held_out = splits.train.rows, splits.validation.rows
    assert len(held_out) == 5 and sorted(rows + held_out) == list(range(20))
    assert hold_out(source, 0.25, "k").validation.rows == held_out != list(range(15, 20))
    assert [record.name for record in splits.validation] == [source.read(row).name for row in held_out]
    with pytest.raises(UserError, match=r"^k: nothing can be held out of pictures; name a split"):
        hold_out(Pictures(4), 0.25, "k")
    with pytest.raises(UserError, match="leave none to train on"):
        hold_out(source, 0.99, "k")


def test_what_is_held_out_does_not_depend_on_labels(tmp_path):
    """A tokenizer sees pictures without a label, and tokens leave them out."""
    labels = [row % NUM_CLASSES if row % 4 else -1 for row in range(40)]
    columns = Features({"img": ImageFeature(), "label": ClassLabel(names=[*"abc"])})
    data = Dataset.from_dict({"img": [picture(row) for row in range(40)], "label": labels}, columns)
    data.save_to_disk(tmp_path / "half")
    spec = f"arrow:{tmp_path}/half"
    seen, of_tokens = (
        open_splits(spec, "25%", key="k", image_size=16, label_default=default) for default in (None, "drop")
    )
    held_out = {record.name for record in seen.validation}
    assert len(held_out) == 10
    assert {record.name for record in of_tokens.validation} < held_out
    assert len({record.name for record in of_tokens.train} - held_out) == len(of_tokens.train)
    assert len(of_tokens.train) + len(of_tokens.validation) == 30
    assert None not in [*of_tokens.train.labels, *of_tokens.validation.labels]
    for part in (seen.train, of_tokens.train, of_tokens.validation):
        called = [f"row {record.name.rpartition('/')[2]} of the data, counted from 0" for record in part]
        assert [called_in(part, index) for index in range(len(part))] == called


@pytest.mark.parametrize("value", ["", "100%", "x%", "5 %", "%"])
def test_a_validation_split_is_a_name_or_a_share(value):
    with pytest.raises(UserError, match=r"^data\.validation_split: .* neither the name of a split nor a share"):
        DataConfig(validation_split=value)


def test_nothing_is_held_out_of_one_picture_or_a_stream_unless_it_is_asked_for(tmp_path, every_form):
    one = str(fill(tmp_path / "one", 1))
    assert open_splits(one, key="k", image_size=16).validation is None
    (tmp_path / "parquet" / "test-00000-of-00001.parquet").unlink()
    stream = every_form["hf-stream"]
    assert open_splits(stream, key="k", image_size=16).validation is None
    with pytest.raises(UserError, match=r"^k: nothing can be held out of hf-stream:"):
        open_splits(stream, "5%", key="k", image_size=16)
    assert len(pixels(open_source(stream, image_size=16))) == 24


@pytest.mark.parametrize("wanted", ["0%", None])
def test_a_tokenizer_is_always_validated(wanted, tmp_path, make_config):
    images = fill(tmp_path / "data", 1 if wanted is None else 8)
    config = make_config(
        tokenizer=None, model=TINY_VQ, objective=ReconstructionConfig(perceptual_weight=0),
        data=DataConfig(images=str(images), validation_split=wanted),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^data\.validation_split: .*, and a tokenizer is validated; name a split"):
        train(config, tmp_path / "run", quiet=True)
