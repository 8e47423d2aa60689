"""Every option of a whole run, changed alone: the run leaves something else behind, or the option is refused.

Those of objectives, samplers and models are in `unit/test_every_option.py`.
"""

import dataclasses
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY_VQ, picture

from consonar.components import save_tokenizer
from consonar.errors import UserError
from consonar.files.weights import component_config, component_fingerprint, map_tensors
from consonar.generators import base
from consonar.tokenizers.vq import VQTokenizer
from consonar.training import run as runs
from consonar.training.checkpoints import Saver
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.objectives.autoregressive import Autoregressive
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import OptimConfig
from consonar.training.tracking import read_metrics

VALUES: dict[str, dict[str, Any]] = {
    "loop": {
        "steps": 4, "batch_size": 4, "accumulation": 2, "log_every": 2, "validate_every": 1, "sample_every": 1,
        "save_every": 1, "keep_checkpoints": 1, "async_save": False, "fd_samples": 8, "keep_best": True,
        "ema_decay": 0.5, "precision": "bf16", "device": "cuda", "compile": True, "activation_checkpointing": 1,
        "trackers": ("nothing",),
    },
    "optim": {
        "lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 1, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.9,
        "max_grad_norm": 1e-3,
    },
    "data": {
        "tokens": "validation", "validation_tokens": "train", "images": "pictures", "validation_items": 3, "flip": True,
        "classes": "order", "label_default": "no class",  # what a default class does: unit/test_labels.py
        "views": "ten_crop", "validation_split": "25%", "bad_images": "skip", "bad_images_limit": 0.5,
        "weights": (1.0, 3.0),
    },
    "": {"init": "start", "tokenizer": "other", "seed": 1},
}  # fmt: skip
# What an option needs to be read: the kind of run, and other options.
NEEDS = {
    "keep_checkpoints": {"save_every": 1}, "min_lr": {"warmup_steps": 0},
    "fd_samples": "align", "images": "tokenizer run", "flip": "tokenizer run",
    "classes": "align", "label_default": "align", "weights": "mixed run",
    "validation_split": "tokenizer run",
    "bad_images": "broken run", "bad_images_limit": "broken run that skips",
}  # fmt: skip
# What the last three do: test_parallel.py, test_lora_runs.py, test_captions_cli.py.
NESTED = {"model", "objective", "data", "optim", "loop", "parallel", "lora", "text_encoder"}


def test_every_option_of_a_run_has_a_value_here():
    for section, kind in (("loop", LoopConfig), ("optim", OptimConfig), ("data", DataConfig), ("", TrainConfig)):
        names = {item.name for item in dataclasses.fields(kind)} - {"recipe"}  # what a run is called where it is shown
        assert names - NESTED == set(VALUES[section]), kind.__name__


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        save_tokenizer(VQTokenizer(TINY_VQ, name="other"), folder)
    return folder


@pytest.fixture
def bases(make_config, picture_folder, tmp_path):
    """The runs that options are changed in, by name; those that start from another make it."""
    plain = make_config(loop={"steps": 3})
    reconstruct = make_config(
        tokenizer=None, model=TINY_VQ, objective=ReconstructionConfig(perceptual_weight=0),
        data=DataConfig(images=str(picture_folder)), loop={"steps": 2},
    )  # fmt: skip

    def base(name: str) -> TrainConfig:
        if name.startswith("broken run"):
            broken = shutil.copytree(picture_folder, tmp_path / "broken")
            for path in sorted(broken.glob("train/all/*.png"))[:2]:
                path.write_bytes(b"no picture")
            policy = "skip" if "skips" in name else "stop"
            return replace(reconstruct, data=DataConfig(images=str(broken), bad_images=policy))
        if name != "align":
            several = replace(plain.data, tokens=f"{plain.data.tokens},{plain.data.validation_tokens}")
            return {"plain": plain, "tokenizer run": reconstruct, "mixed run": replace(plain, data=several)}[name]
        for index in range(12):
            folder = tmp_path / "labelled" / ("train", "validation")[index % 2] / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index}.png")
        data = DataConfig(images=str(tmp_path / "labelled"))
        objective = PolicyConfig(rewards={"mse": 1.0}, group_size=2)
        start = str(runs.train(make_config(loop={"steps": 1}), tmp_path / "start", quiet=True))
        config = make_config(init=start, tokenizer=None, model=None, objective=objective, data=data, loop={"steps": 1})
        return replace(config, loop=replace(config.loop, batch_size=4))

    return base


@pytest.fixture
def observe(tmp_path, monkeypatch):
    """What a run leaves behind: metrics, pictures, checkpoints, weights, and how often it did what; or why it ended."""

    def observe(config: TrainConfig) -> str:
        calls: list[str] = []
        loss = Autoregressive.loss
        monkeypatch.setattr(Autoregressive, "loss", lambda *given: calls.append("loss") or loss(*given))
        monkeypatch.setattr(runs, "compile_for_training", lambda part: calls.append("compiled"))
        finish = Saver.finish
        monkeypatch.setattr(Saver, "finish", lambda saver: calls.append("written") or finish(saver))
        monkeypatch.setattr(base, "checkpoint", lambda *given, **_: calls.append("checkpoint") or given[0](*given[1:]))
        try:
            run = runs.train(config, tmp_path / "observed", quiet=True)
        except UserError as error:
            shutil.rmtree(tmp_path / "observed", ignore_errors=True)
            return str(error)
        finally:
            monkeypatch.setattr(Autoregressive, "loss", loss)
            monkeypatch.setattr(Saver, "finish", finish)
        lines = read_metrics(run / "metrics.jsonl")
        files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
        model, state = component_config(run / "model"), map_tensors(run / "model" / "model.safetensors")
        found = component_fingerprint({"name": model.get("name")}, state)
        shutil.rmtree(run)
        return repr(([{**line, "time": 0} for line in lines], files, found, calls))

    return observe


@pytest.mark.parametrize(("section", "name"), [(s, name) for s, values in VALUES.items() for name in values])
def test_an_option_of_a_run_changes_what_it_leaves_or_is_refused(
    section, name, bases, observe, stores, picture_folder, other_tokenizer, make_config, tmp_path
):
    value = VALUES[section][name]
    places = {"train": stores[0], "validation": stores[1], "pictures": picture_folder, "other": other_tokenizer}
    if value == "start":
        places["start"] = runs.train(make_config(seed=5, loop={"steps": 1}), tmp_path / "start", quiet=True)
    (tmp_path / "names.txt").write_text("c\nb\na\n")
    places["order"] = tmp_path / "names.txt"
    value = str(places[value]) if isinstance(value, str) and value in places else value

    def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
        return replace(config, **({section: replace(getattr(config, section), **changes)} if section else changes))

    needs = NEEDS.get(name, {})
    if isinstance(needs, str):
        with pytest.raises(UserError, match=rf"{section}\.{name}: .* is read only with"):
            changed(bases("plain"), **{name: value})
        base = bases(needs)
    else:
        base = changed(bases("plain"), **needs)
    if name == "images":
        value = str(shutil.copytree(picture_folder / "validation", tmp_path / "pictures" / "train").parent)
        shutil.copytree(picture_folder / "validation", tmp_path / "pictures" / "validation")
    assert observe(changed(base, **{name: value})) != observe(base)


def test_a_part_of_a_validation_that_does_not_exist_is_refused_or_said_to_be_unread(bases, tmp_path, capsys):
    config = bases("plain")
    with pytest.raises(UserError, match=r"data\.validation_items: 3 is read only with a data\.validation_tokens"):
        replace(config, data=replace(config.data, validation_tokens="", validation_items=3))
    data = replace(config.data, tokens=config.data.validation_tokens, validation_tokens=None, validation_items=3)
    runs.train(replace(config, data=data), tmp_path / "run")
    assert "no data for validation: data.validation_items 3 is not read" in capsys.readouterr().out
