"""Captions on the device: encoded, trained on, post-trained on and drawn by, with one graph a token as classes are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from device import graphs
from interface.test_captions_cli import MODEL, save_encoder, save_tokenizer_of_32

from consonar import cli
from consonar.components import load_generator, load_own_text_encoder
from consonar.networks.text_encoders import PretrainedTextEncoder, load_text_encoder
from consonar.types import TextCondition

pytest.importorskip("transformers")
LOOP = ["--loop.batch-size", "4", "--loop.steps", "2", "--loop.log-every", "1", "--data.validation-items", "4",
        "--loop.precision", "bf16", "--quiet"]  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> None:
    """A tokenizer and a text encoder, read once before there is a device: transformers keeps what it finds of PyTorch
    at first, and would leave tables of positions empty."""
    save_tokenizer_of_32(tmp_path / "tok")
    save_encoder(tmp_path / "enc")
    load_text_encoder(str(tmp_path / "enc"), length=12)


def test_captions_go_through_every_command_on_the_device(models, cuda, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))  # no caption is known
    plain, read_on = PretrainedTextEncoder.encode, list[str]()

    def encode(self: PretrainedTextEncoder, captions: Sequence[str]) -> TextCondition:
        read_on.append(self.network.device.type)
        return plain(self, captions)

    monkeypatch.setattr(PretrainedTextEncoder, "encode", encode)
    cli.main(["tokenize", "--tokenizer", str(tmp_path / "tok"), "--data", "scenes:8", "--split", "train",
              "--text-encoder", str(tmp_path / "enc"), "--out", str(tmp_path / "scenes")])  # fmt: skip
    cli.main(["train", "ar-scenes", "--tokenizer", str(tmp_path / "tok"), "--data.tokens", str(tmp_path / "scenes"),
              "--data.validation-tokens", str(tmp_path / "scenes"), "--text-encoder", str(tmp_path / "enc"), "--out",
              str(tmp_path / "run"), *MODEL, *LOOP])  # fmt: skip
    cli.main(["train", "vapi-scenes", "--init", str(tmp_path / "run"), "--data", "scenes:8", "--out",
              str(tmp_path / "vapi"), "--objective.rewards", "mse=1", "--data.validation-split", "50%",
              *LOOP])  # fmt: skip
    for name, key in (("run", "cross_entropy"), ("vapi", "reward")):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "train/loss" in line} == {1, 2}
        assert any(f"validation/{key}" in line for line in lines)
    made = len(graphs.STATE.made)
    drawn = []
    for device in ("auto", "cpu"):
        out = tmp_path / f"{device}.npz"
        cli.main(["sample", str(tmp_path / "vapi"), "--prompt", "two red apples above a dog", "--num-samples", "3",
                  "--guidance-scale", "2", "--precision", "fp32", "--device", device, "--out", str(out)])  # fmt: skip
        with np.load(out) as found:
            drawn.append(found["tokens"])
    assert len(graphs.STATE.made) > made and np.array_equal(*drawn)
    encoder = load_own_text_encoder(tmp_path / "vapi", load_generator(tmp_path / "vapi").to("cuda"))
    assert encoder.network.device.type == "cuda"  # as evaluate and diagnose load it
    assert read_on == ["cuda", "cuda"]  # for tokenize and the first sample; what is read is kept
