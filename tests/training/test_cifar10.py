"""CIFAR-10 by name, wherever it lies, and its recipes on a few pictures in its layout."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from consonar import cli
from consonar.components import load_tokenizer
from consonar.data.cifar10 import CLASS_NAMES, HUB, cifar10_place
from consonar.data.loader import image_batches
from consonar.data.sources import Part, open_source
from consonar.data.splits import open_splits
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.evaluation.inputs import open_reference
from consonar.evaluation.reconstruction import reconstruction_metrics
from consonar.files.readers import read_json
from consonar.recipes import RECIPES, cifar10, find_recipe, recipes_of
from consonar.training.config import TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

RESULTS = Path(__file__).parents[2] / "claims" / "results"
WHOLE = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


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
    with pytest.raises(UserError, match=r"^CONSONAR_CIFAR10: elsewhere is not there; a copy is"):
        open_source("cifar10", image_size=32)
    with pytest.raises(UserError, match=r"^data: cifar10:nowhere is not there; a copy is a folder of Parquet"):
        open_source("cifar10:nowhere", image_size=32)
    with pytest.raises(UserError, match=r"^data: cifar10:.*\.parquet is a file; a copy is a folder of Parquet"):
        open_source(f"cifar10:{next(copy.glob('*.parquet'))}", image_size=32)


@pytest.mark.parametrize("file", ["batches.bin", "notes.txt"])  # nothing that can be read; a table of lines
def test_a_folder_that_is_no_copy_is_told_what_one_is(file, tmp_path, monkeypatch):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / file).write_text("a\nb\n")
    monkeypatch.setenv("CONSONAR_CIFAR10", "copy")
    with pytest.raises(UserError, match=r"copy.*; a copy of CIFAR-10, which CONSONAR_CIFAR10 or .* names, is a folder"):
        open_source("cifar10", split="test", image_size=32)


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


def test_a_readme_that_is_no_card_is_not_spoken_of(copy, tmp_path, caplog):
    logger = logging.getLogger("huggingface_hub.repocard")
    logger.addHandler(caplog.handler)
    shutil.copytree(copy, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("# Pictures")
    open_splits(f"cifar10:{tmp_path / 'copy'}", key="k", image_size=32)
    open_splits(f"hf:{tmp_path / 'copy'}", key="k", image_size=32)
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_another_data_set_is_not_taken_for_it(tmp_path):
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        Dataset.from_dict({"img": [picture(0)], "label": [0]}, features).to_parquet(tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=r"is not CIFAR-10, whose classes are airplane, .*, truck; it has cat, dog$"):
        open_source(f"cifar10:{tmp_path}", image_size=32)
    with pytest.raises(UserError, match=r"has no split 'dev'; choices: test, a share of train such as 5%"):
        open_splits("cifar10", "dev", key="k", image_size=32)


def small(config: TrainConfig, **changes: object) -> TrainConfig:
    """The recipe at a small size, for two steps of four pictures on the CPU."""
    loop = replace(config.loop, steps=2, batch_size=4, log_every=1, device="cpu", precision="fp32")
    if config.run == "generator":
        changes["model"] = replace(config.model, width=32, num_layers=2)
    if config.run == "tokenizer":
        changes["model"] = replace(config.model, base_channels=16)
    return replace(config, loop=loop, **changes)


POST_TRAINING = ("vapi-cifar10", "vapi-spatial-cifar10", "isentropic-cifar10", "sar-cifar10", "ste-cifar10")


@pytest.mark.parametrize(
    "names",
    [
        ("tokenizer-cifar10-32", "ar-cifar10", "rear-cifar10", "ce-cifar10"),
        pytest.param(("ar-cifar10", *POST_TRAINING), marks=pytest.mark.slow),
    ],
    ids=["quick", "post-training"],
)
def test_every_recipe_starts_and_learns_on_a_few_pictures(names, copy, monkeypatch):
    monkeypatch.setenv("CONSONAR_CIFAR10", str(copy))
    argv = ["tokenize", "--tokenizer", "cifar10-32", "--data", "cifar10", "--out", "tokens/cifar10", "--device", "cpu"]
    cli.main(argv)
    store = TokenStore.open("tokens/cifar10")
    assert (len(store), store.num_tokens, store.class_names) == (20, 64, CLASS_NAMES)
    for name in names:
        init = "runs/ar-cifar10" if name in ("ce-cifar10", *POST_TRAINING) else None
        run = train(small(find_recipe(name), init=init), Path("runs") / name, quiet=True)
        lines = read_metrics(run / "metrics.jsonl")
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
        assert any(key.startswith("validation/") for line in lines for key in line)
        assert read_json(run / "origin.json")["class_names"] == list(CLASS_NAMES)


def test_the_recipes_are_those_of_the_house():
    names = {"tokenizer-cifar10-32", "ar-cifar10", "rear-cifar10", "ce-cifar10", *POST_TRAINING}
    assert set(recipes_of(cifar10)) == {name for name in RECIPES if "cifar10" in name} == names


def test_the_shipped_tokenizer_has_the_shape_of_its_recipe_and_is_small():
    tokenizer, recipe = load_tokenizer("cifar10-32"), find_recipe("tokenizer-cifar10-32")
    assert tokenizer.config == recipe.model
    assert (tokenizer.name, tokenizer.image_size, tokenizer.num_tokens) == ("cifar10-32", 32, 64)
    folder = Path(cifar10.__file__).parents[1] / "tokenizers" / "pretrained" / "cifar10-32"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    card, found = (folder / "README.md").read_text(), read_json(RESULTS / "tokenizers" / "cifar10-32.json")
    assert tokenizer.fingerprint in card and tokenizer.fingerprint == found["origin"]["tokenizer_fingerprint"]
    rfd, perceptual = (found[f"{name}(efficientnet-lite0)"] for name in ("rFD", "perceptual"))
    assert (
        f"| {found['psnr']:.2f} dB | {found['ssim']:.3f} | {found['l1']:.4f} | {rfd:.1f} | {perceptual:.3f} | "
        f"{100 * found['usage']:.1f} % | {found['perplexity']:.0f} |\n" in card
    )
    assert found["num_images"] == 10_000 and found["psnr"] >= 24 and found["usage"] >= 0.95


@pytest.mark.skipif(not WHOLE.is_dir(), reason="no copy of CIFAR-10 at ../shared/data/cifar10")
def test_the_shipped_tokenizer_reconstructs_photographs_that_it_was_not_trained_on():
    """On 250 of the 10,000; the model card has all."""
    source = open_source(f"cifar10:{WHOLE}", split="test", image_size=32)
    batches = image_batches(Part(source, range(250), source.name), 32, batch_size=100, seed=0)
    metrics = reconstruction_metrics(load_tokenizer("cifar10-32"), (batch.images for batch in batches.ordered(100)))
    assert metrics["psnr"] > 24 and metrics["usage"] > 0.95 and metrics["num_images"] == 250
