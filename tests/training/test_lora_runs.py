"""Runs that train adapters: exact resume, what is in a checkpoint, the merged model, mistakes."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import NUM_CLASSES, picture, same
from forked import run_on_two
from training.test_parallel import STEPS, last, sharded, steadily

from consonar.errors import UserError
from consonar.files.weights import map_tensors
from consonar.generators.rear import ReARConfig
from consonar.training import best
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.lora import LoRAConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

pytest.importorskip("peft")
RANK_4 = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture
def configs(make_config, tmp_path):
    """reAR with dropout and heads of its own, and VA-pi against its start model; all that moves is on."""
    for split, first, count in (("train", 0, 12), ("validation", 100, 6)):
        for index in range(first, first + count):
            folder = tmp_path / "labelled" / split / "abc"[index % NUM_CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index:03d}.png")
    start = str(train(make_config(loop={"steps": 30}), tmp_path / "start", quiet=True))
    rear = AutoregressiveConfig(embedding_weight=0.5, head_width=16, noise=NoiseConfig(schedule="linear"))
    policy = PolicyConfig(
        rewards={"mse": 1.0}, group_size=4, context_noise=0.2, kl_weight=0.1, entropy="position",
        estimator="reinforce",
    )  # fmt: skip
    loop = {"steps": 6, "ema_decay": 0.9, "accumulation": 2, "activation_checkpointing": 1, "batch_size": 4}
    shape = ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.1)
    return {
        "rear": make_config(init=start, objective=rear, model=shape, loop=loop, lora=replace(RANK_4, dropout=0.1)),
        "policy": make_config(
            init=start, tokenizer=None, model=None, objective=policy, loop=loop | {"fd_samples": 8}, lora=RANK_4,
            data=DataConfig(images=str(tmp_path / "labelled")),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["rear", "policy"])
def test_resume_is_exact_and_checkpoints_hold_what_is_trained(name, configs, tmp_path, quarters, monkeypatch):
    monkeypatch.setattr(best, "NETWORK", "quarters")
    config = configs[name]
    straight = train(config, tmp_path / "straight", quiet=True)
    broken = train(config, tmp_path / "broken", stop_at=3, quiet=True)
    torch.manual_seed(12345)
    train(config, broken, resume=True, quiet=True)
    ours, theirs = (load_resume(list_resume(run / "checkpoints")[-1]) for run in (straight, broken))
    assert same(ours, theirs)
    lines = [[{**line, "time": 0} for line in read_metrics(run / "metrics.jsonl")] for run in (straight, broken)]
    assert lines[0] == lines[1]
    assert all(".lora_" in key or not key.startswith("generator.") for key in ours["model"])
    assert ours["model"].keys() == ours["average"].keys()
    trained = [key for key in ours["model"] if not key.startswith(("reward_", "num_"))]
    assert len(trained) == len(ours["optimizer"]["state"]) == (16 if name == "policy" else 16 + 12)
    model, start = (map_tensors(run / "model" / "model.safetensors") for run in (straight, tmp_path / "start"))
    assert same(model, map_tensors(broken / "model" / "model.safetensors")) and model.keys() == start.keys()
    moved = [key for key in model if not torch.equal(model[key], start[key])]
    assert len(moved) == 8 and all("adaLN" not in key and key.endswith("weight") for key in moved)
    average = ours["average"]
    for key in moved:
        a, b = (average[f"generator.{key.removesuffix('weight')}lora_{part}.default.weight"] for part in "AB")
        assert torch.allclose(model[key], start[key] + 2 * b @ a, atol=1e-6)
    if name == "policy":
        assert map_tensors(straight / "best" / "model.safetensors").keys() == start.keys()
        assert next(line for line in lines[0] if "validation/kl" in line)["validation/kl"] == 0


@pytest.mark.slow
def test_two_processes_resume_exactly(configs, tmp_path):
    """Copies and shards; that two processes equal one is in `test_parallel.py`."""
    policy = configs["policy"]
    policy = replace(policy, loop=replace(policy.loop, steps=STEPS, fd_samples=0))
    whole = {"ddp": policy, "fsdp": sharded(policy)}
    halves = {f"{name}-half": config for name, config in whole.items()}
    run_on_two(steadily, whole | halves, tmp_path)
    run_on_two(steadily, halves, tmp_path)
    for name in whole:
        assert same(last(tmp_path / name), last(tmp_path / f"{name}-half"))


def test_mistakes_are_one_line(configs, make_config, tmp_path, monkeypatch):
    for settings in ({"alpha": 8.0}, {"dropout": 0.1}, {"targets": ("qkv",)}):
        with pytest.raises(UserError, match=r"lora\.\w+: .* is read only with lora\.rank over 0"):
            LoRAConfig(**settings)
    with pytest.raises(UserError, match=r"lora\.rank: -1"):
        LoRAConfig(rank=-1)
    with pytest.raises(UserError, match=r"lora\.rank: 4, but random weights are no model to adapt"):
        make_config(lora=RANK_4)
    with pytest.raises(UserError, match=r"lora\.dropout: 0\.1 is read only with objective\.kind"):
        replace(configs["policy"], lora=replace(RANK_4, dropout=0.1))
    run = train(configs["rear"], tmp_path / "run", stop_at=1, quiet=True)
    with pytest.raises(UserError, match=r"--resume: lora\.rank is 2, but the run in .* was started with 4"):
        train(replace(configs["rear"], lora=replace(RANK_4, rank=2, dropout=0.1)), run, resume=True, quiet=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora\.rank: 4: .*; install with: pip install 'consonar\[lora\]'"):
        train(configs["policy"], tmp_path / "other", quiet=True)
