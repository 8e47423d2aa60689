"""Several token stores in one run: their shares, their epochs, and that a resumed run reads the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import Pictures

from consonar import cli
from consonar.data import loader
from consonar.data.loader import BLOCK, TokenBatches, mixed_rows, shares
from consonar.data.mixture import TokenStores, as_one, store_paths
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.training import run as runs
from consonar.training.run import with_validation
from consonar.training.tracking import read_metrics


@pytest.fixture
def pair(tmp_path, tokenizer) -> tuple[TokenStore, TokenStore]:
    """Stores of 5 items in two views and of 12 items in one."""
    small = write_token_store(tmp_path / "small", Pictures(5), tokenizer, views="center_flip")
    return small, write_token_store(tmp_path / "large", Pictures(12, first=50), tokenizer)


def test_shares_are_of_a_block_by_largest_remainder():
    assert shares([0.7, 0.3]) == [7000, 3000] and shares([2, 1]) == [6667, 3333]
    assert sum(shares([1, 1, 1, 1e-3])) == BLOCK
    with pytest.raises(UserError, match=r"data\.weights: 1e-06 is less than one item of 10,000"):
        shares([1, 1e-6])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_stream_does_not_depend_on_batches_or_ranks(world_size):
    sizes, counts = [5, 40], shares([0.6, 0.4])
    place = {"sizes": sizes, "counts": counts, "seed": 3}
    whole = mixed_rows(0, 600, rank=0, world_size=1, **place)
    batches = [
        torch.stack([mixed_rows(step, 60 // world_size, rank=rank, world_size=world_size, **place)
                     for rank in range(world_size)], 1).flatten() for step in range(10)
    ]  # fmt: skip
    assert torch.equal(torch.cat(batches), whole)


def test_each_store_goes_through_epochs_of_its_own(monkeypatch):
    monkeypatch.setattr(loader, "BLOCK", 10)
    rows = mixed_rows(0, 200, [5, 40], [6, 4], seed=0, rank=0, world_size=1).tolist()
    small, large = [row for row in rows if row < 5], [row - 5 for row in rows if row >= 5]
    assert (len(small), len(large)) == (120, 80), "of every 10 items exactly 6 and 4"
    for items, size in ((small, 5), (large, 40)):
        epochs = [items[start : start + size] for start in range(0, len(items), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), "none twice before all came"
        assert epochs[0] != epochs[1]
    assert Counter(row < 5 for row in rows[:100])[True] == 60


def test_items_labels_and_views_of_several_stores(pair):
    both = as_one(pair)
    assert isinstance(both, TokenStores) and len(both) == 17 and both.num_views == 2
    rows = torch.tensor([16, 0, 5, 4, 4])
    views = torch.tensor([1, 0, 0, 1, 0])
    read = both.read(rows, views)
    expected = [pair[1].read(rows[:1] - 5, views[1:2])[0], *pair[0].read(rows[[1, 3, 4]], views[[1, 3, 4]])]
    assert torch.equal(read[[0, 1, 3, 4]], torch.stack(expected))
    assert both.labels.tolist() == [*pair[0].labels.tolist(), *pair[1].labels.tolist()]
    assert as_one(pair[:1]) is pair[0]
    assert both.origin.data_sha256 != as_one(pair[::-1]).origin.data_sha256
    with pytest.raises(IndexError):
        both.read(torch.tensor([17]), torch.tensor([0]))


def test_without_weights_several_stores_are_one_of_all_their_items(pair):
    batches = TokenBatches(as_one(pair), batch_size=17, seed=0)
    assert sorted(batches.rows(0).tolist()) == list(range(17))
    with pytest.raises(UserError, match=r"data\.weights: 3 weights for 2 stores"):
        TokenBatches(as_one(pair), [1, 1, 1], batch_size=2, seed=0)


def test_stores_that_do_not_go_together_are_refused_with_both_names(pair, tmp_path, tokenizer):
    class Others(Pictures):
        class_names = ("a", "x", "c")

    class Bare(Pictures):
        class_names = None

        def __iter__(self):
            return (replace(record, label=None) for record in super().__iter__())

    other = tmp_path / "other"
    tokenizer.post_quant_conv.weight.data.add_(1)  # another fingerprint
    tokens = write_token_store(other / "tokens", Pictures(3), tokenizer)
    tokenizer.post_quant_conv.weight.data.sub_(1)
    for store, said in (
        (tokens, "the tokenizer is"),
        (write_token_store(other / "classes", Others(3), pair_tokenizer(pair, tokenizer)), "class 1 is 'x'"),
        (write_token_store(other / "bare", Bare(3), pair_tokenizer(pair, tokenizer)), "has no classes, and"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            as_one([pair[1], store])
        assert str(pair[1].path) in str(caught.value) and str(store.path) in str(caught.value)


def pair_tokenizer(pair, tokenizer):
    """The tokenizer of the pair, by its fingerprint."""

    class Same:
        def __getattr__(self, name):
            return pair[0].fingerprint if name == "fingerprint" else getattr(tokenizer, name)

    return Same()


def test_a_comma_in_the_name_of_a_folder_names_one(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert store_paths(f"{tmp_path}/a,b") == [f"{tmp_path}/a,b"] and store_paths("a, b") == ["a", "b"]


def test_a_run_on_two_stores_is_resumed_exactly(make_config, stores, pair, tmp_path):
    config = make_config(loop={"steps": 4, "save_every": 2})
    words = f"{stores[0]},{pair[1].path}"
    config = replace(config, data=replace(config.data, tokens=words, weights=(0.25, 0.75)))
    whole = runs.train(config, tmp_path / "whole", quiet=True)
    runs.train(config, tmp_path / "parts", quiet=True, stop_at=2)
    with pytest.raises(UserError, match=r"data\.weights"):
        changed = replace(config, data=replace(config.data, weights=(0.5, 0.5)))
        runs.train(changed, tmp_path / "parts", quiet=True, resume=True)
    runs.train(config, tmp_path / "parts", quiet=True, resume=True)
    losses = [[line.get("loss") for line in read_metrics(run / "metrics.jsonl")] for run in (whole, tmp_path / "parts")]
    assert losses[0] == losses[1]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, tmp_path / "parts")]
    assert weights[0] == weights[1]


def test_validation_stores_beside_all_of_them_are_taken(make_config, tmp_path):
    config = make_config()
    for name in ("a", "b", "a-validation"):
        (tmp_path / name).mkdir()
    data = replace(config.data, tokens=f"{tmp_path}/a,{tmp_path}/b", validation_tokens=None)
    config = replace(config, data=data)
    assert with_validation(config).data.validation_tokens is None
    (tmp_path / "b-validation").mkdir()
    assert with_validation(config).data.validation_tokens == f"{tmp_path}/a-validation,{tmp_path}/b-validation"


def test_a_run_on_two_stores_from_the_command_line(stores, pair, tokenizer_folder, tmp_path, capsys):
    argv = [
        "train",
        "ar-openmoji",
        "--tokenizer",
        str(tokenizer_folder),
        "--model.width",
        "32",
        "--model.num-heads",
        "2",
    ]
    argv += [
        "--model.num-layers",
        "1",
        "--data.tokens",
        f"{stores[0]},{pair[1].path}",
        "--data.weights",
        "0.25",
        "0.75",
    ]
    argv += ["--data.views", "center", "--loop.steps", "1", "--loop.batch-size", "4", "--loop.device", "cpu"]
    cli.main([*argv, "--data.validation-tokens", str(stores[1]), "--out", str(tmp_path / "run")])
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert data["weights"] == [0.25, 0.75]
    assert "train: 40 pictures" in capsys.readouterr().out
