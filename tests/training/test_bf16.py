"""A run in bf16 learns as one in float32: each step multiplies by the weights that it has, and what a step prepares
without gradient costs no gradient."""

import pytest
import torch
from conftest import TINY_VQ, picture

from consonar.training.config import DataConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

FAST = {"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0}


@pytest.fixture
def settings(make_config, tmp_path) -> dict[str, dict]:
    """Of a run of each kind, and the loss that falls in it."""
    for index in range(12):
        folder = tmp_path / "pictures" / ("train", "validation")[index % 2] / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    images = DataConfig(images=str(tmp_path / "pictures"))
    start = str(train(make_config(loop={"steps": 1}), tmp_path / "start", quiet=True))
    policy = PolicyConfig(rewards={"mse": 1.0}, group_size=4, ce_weight=1.0, inner_epochs=2)
    return {
        "generator": {"objective": AutoregressiveConfig(embedding_weight=1.0, head_width=16)},
        "tokenizer": {
            "tokenizer": None, "model": TINY_VQ, "data": images,
            "objective": ReconstructionConfig(perceptual_weight=0, revive_after=0),
        },
        "post-training": {"init": start, "tokenizer": None, "model": None, "objective": policy, "data": images},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "term"), [("generator", "cross_entropy"), ("tokenizer", "mse"), ("post-training", "cross_entropy")]
)
def test_a_run_in_bf16_learns_as_one_in_float32(kind, term, settings, make_config, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        loop = {"steps": 8, "batch_size": 6, "precision": precision}
        run = train(make_config(**settings[kind], optim=FAST, loop=loop), tmp_path / precision, quiet=True)
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
        found[precision] = torch.tensor([[line[f"train/{key}"] for key in (term, "grad_norm")] for line in lines])
    fell = found["fp32"][0, 0] - found["fp32"][:, 0].min()
    assert fell > 0.1 * found["fp32"][0, 0], found  # stale weights would agree where nothing is learnt
    assert (found["bf16"] - found["fp32"])[:, 0].abs().max() < 0.3 * fell, found
    assert 0.7 < found["bf16"][0, 1] / found["fp32"][0, 1] < 1.4, found
