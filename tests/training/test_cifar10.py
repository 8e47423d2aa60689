"""CIFAR-10 by name, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from consonar.data.cifar10 import CLASS_NAMES, HUB, cifar10_place
from consonar.data.sources import open_source
from consonar.data.splits import open_splits
from consonar.errors import UserError
from consonar.evaluation.inputs import open_reference


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder in the layout of the public data set: 20 pictures to train on, 10 to test on."""
    folder = tmp_path_factory.mktemp("cifar10")
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(CLASS_NAMES))})
    for split, first, count in (("train", 0, 20), ("test", 100, 10)):
        rows = range(first, first + count)
        columns = {"img": [picture(row, 32) for row in rows], "label": [row % 10 for row in rows]}
        Dataset.from_dict(columns, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONSONAR_CIFAR10", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_copy_is_found_by_path_variable_or_cache_and_else_the_public_set_is_meant(copy, tmp_path, monkeypatch):
    assert cifar10_place("") == HUB
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cifar10").symlink_to(copy)
    assert cifar10_place("") == str(tmp_path / "cache" / "cifar10")
    monkeypatch.setenv("CONSONAR_CIFAR10", str(tmp_path))
    assert cifar10_place("") == str(tmp_path) and cifar10_place(str(copy)) == str(copy)
    monkeypatch.setenv("CONSONAR_CIFAR10", "elsewhere")
    with pytest.raises(UserError, match=r"^CONSONAR_CIFAR10: no folder 'elsewhere'$"):
        open_source("cifar10", image_size=32)
    with pytest.raises(UserError, match=r"^data: cifar10: no folder 'nowhere'$"):
        open_source("cifar10:nowhere", image_size=32)


def test_it_is_the_same_data_set_in_every_place(copy, monkeypatch):
    by_path = open_splits(f"cifar10:{copy}", key="k", image_size=32)
    monkeypatch.setenv("CONSONAR_CIFAR10", str(copy))
    by_name, plain = (open_splits(spec, key="k", image_size=32) for spec in ("cifar10", f"hf:{copy}"))
    assert by_name.train.name == by_path.train.name == "cifar10[train]" and by_name.validation.name == "cifar10[test]"
    assert by_name.train.class_names == plain.train.class_names == CLASS_NAMES
    assert by_name.train.content_hash == by_path.train.content_hash == plain.train.content_hash
    assert [record.label for record in by_name.validation] == list(range(10))
    assert np.array_equal(np.asarray(by_name.train.read(3).image), np.asarray(picture(3, 32)))
    assert {name: len(next(iter(one.stream(64)))) for name, one in open_reference("cifar10", 32).images.items()} == {
        "train": 20, "validation": 10,
    }  # fmt: skip


def test_another_data_set_is_not_taken_for_it(tmp_path):
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        Dataset.from_dict({"img": [picture(0)], "label": [0]}, features).to_parquet(tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=r"is not CIFAR-10, whose classes are airplane, .*, truck; it has cat, dog$"):
        open_source(f"cifar10:{tmp_path}", image_size=32)
    with pytest.raises(UserError, match=r"has no split 'dev'; choices: test, a share of train such as 5%"):
        open_splits("cifar10", "dev", key="k", image_size=32)
