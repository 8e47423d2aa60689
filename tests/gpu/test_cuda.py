"""What only a CUDA device can show. Run with `make test-gpu`; without a device these tests fail, they do not skip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from consonar.components import load_generator
from consonar.distributed import pick_device
from consonar.evaluation.inputs import ReferenceSet, encode_reference, folder_image_set
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import gumbel_noise
from consonar.training.run import train

pytestmark = pytest.mark.gpu


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_training_on_cuda_follows_the_cpu(make_config, tmp_path: Path) -> None:
    rear = AutoregressiveConfig(
        embedding_weight=1.0, head_width=16, noise=NoiseConfig(schedule="uniform", max_rate=0.5)
    )
    cpu = losses(train(make_config(objective=rear), tmp_path / "cpu", quiet=True))
    cuda = losses(train(make_config(objective=rear, loop={"device": "cuda"}), tmp_path / "cuda", quiet=True))
    assert cuda == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("corruption", ["uniform", "mask", "nearest"])
def test_bf16_with_compiled_blocks_trains(make_config, tmp_path: Path, corruption: str) -> None:
    noise = NoiseConfig(schedule="linear", corruption=corruption)
    config = make_config(
        objective=AutoregressiveConfig(embedding_weight=1.0, head_width=16, noise=noise),
        loop={"device": "cuda", "precision": "bf16", "compile": True, "steps": 4, "ema_decay": 0.9},
    )
    values = losses(train(config, tmp_path / "run", quiet=True))
    assert len(values) == 4 and all(torch.isfinite(torch.tensor(values)))
    load_generator(tmp_path / "run")


def test_samples_on_cuda_equal_those_of_the_cpu(tiny_generator) -> None:
    generator, labels = tiny_generator(), torch.tensor([0, 1, 2])
    config = SamplerConfig(guidance_scale=2.0, temperature=0.0)
    expected, _ = sample_tokens(generator, labels, range(3), config)
    actual, _ = sample_tokens(generator.cuda(), labels.cuda(), range(3), config)
    assert (actual.cpu() == expected).float().mean() > 0.9


def test_resume_on_cuda(make_config, tmp_path: Path) -> None:
    config = make_config(loop={"device": "cuda"})
    whole = losses(train(config, tmp_path / "whole", quiet=True))
    train(config, tmp_path / "cut", stop_at=3, quiet=True)
    assert losses(train(config, tmp_path / "cut", resume=True, quiet=True)) == pytest.approx(whole, rel=1e-5)


def test_a_reference_is_encoded_as_on_the_cpu(tokenizer, picture_folder: Path) -> None:
    """Its pictures are read on the CPU; the convolutions are float32, not TF32."""
    reference = ReferenceSet("x", {"train": folder_image_set(picture_folder / "train" / "all")[0]})
    here = encode_reference(reference, tokenizer)
    there = encode_reference(reference, tokenizer.to(pick_device("cuda")))
    assert here.tokens and there.tokens
    assert (here.tokens["train"] == there.tokens["train"]).float().mean() > 0.999


def test_noise_of_a_row_is_drawn_on_the_device_from_its_seed_alone() -> None:
    logits = torch.zeros(4, 3, 5, device="cuda")
    noise = gumbel_noise(torch.arange(4), logits)
    assert noise.is_cuda and torch.equal(noise[2:], gumbel_noise(torch.arange(2, 4), logits[2:]))
