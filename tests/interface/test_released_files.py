"""A researcher's files: convert, sample, post-train and back; one tokenizer file serves several image sizes."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import picture
from unit.released_models import CASES, released

from consonar import cli
from consonar.components import load_tokenizer, read_origin
from consonar.convert.layouts.generators import LLAMAGEN as OFFICIAL
from consonar.generators.llamagen import LlamaGenConfig
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS, resized
from consonar.types import Grid

GPT = LlamaGenConfig(
    width=64, num_layers=1, num_heads=1, vocab_size=16, num_tokens=16, num_classes=3, grid=Grid(4, 4)
)  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """vq.pt, a VQ of factor 2; gpt.pt, a GPT of 16 tokens: images of 8 pixels. In the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": released("vq")}, "vq.pt")
    from consonar.generators.llamagen import LlamaGenGenerator

    model = LlamaGenGenerator(GPT)
    model.reset_parameters(seeded(0, "released_files"))
    torch.save({"model": OFFICIAL.to_official(model.state_dict(), {}, GPT)}, "gpt.pt")
    for index in range(6):
        folder = tmp_path / "images" / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).resize((8, 8)).save(folder / f"{index}.png")
    return tmp_path


def test_one_tokenizer_file_serves_other_image_sizes(files, capsys):
    cli.main(["convert", "vq.pt", "--to", "models/vq"])
    assert "LlamaGen" in capsys.readouterr().out
    assert load_tokenizer("models/vq").image_size == 256
    small = load_tokenizer("models/vq", num_tokens=16)
    assert (small.image_size, small.num_tokens) == (8, 16)
    state, whole = small.state_dict(), load_tokenizer("models/vq").state_dict()
    assert all(torch.equal(state[key], whole[key]) for key in whole)
    assert load_tokenizer("models/vq", num_tokens=17).image_size == 256  # no square has 17 tokens


def test_convert_sample_and_post_train(files, capsys):
    """The GPT is of 4 x 4 tokens; the VQ folder says 256 pixels: sampling and training take it at 8."""
    cli.main(["convert", "vq.pt", "--to", "models/vq"])
    cli.main(["convert", "gpt.pt", "--to", "models/gpt", "--image-size", "64"])  # 16 pixels per token: 4 x 4
    sampler = ["sample", "models/gpt", "--classes", "2,0", "--guidance-scale", "1.75", "--device", "cpu"]
    cli.main([*sampler, "--tokenizer", "models/vq", "--out", "two.npz"])
    with pytest.raises(SystemExit) as stop:
        cli.main([*sampler, "--out", "three.npz"])
    assert stop.value.code == 2 and "--tokenizer" in capsys.readouterr().err
    cli.main(
        [
            "train", "vapi-openmoji", "--init", "models/gpt", "--tokenizer", "models/vq", "--out", "runs/vapi",
            "--data", "imagefolder:images", "--objective.rewards", "mse=1", "--objective.group-size", "2",
            "--loop.steps", "1", "--loop.batch-size", "2", "--loop.device", "cpu", "--quiet",
        ]
    )  # fmt: skip
    origin = read_origin("runs/vapi")
    assert origin.tokenizer_fingerprint == load_tokenizer("models/vq", num_tokens=16).fingerprint
    cli.main(["sample", "runs/vapi", "--classes", "1", "--out", "one.png", "--device", "cpu"])
    cli.main(["convert", "runs/vapi/model", "--to-official", "back.pt"])
    back, given = torch.load("back.pt"), torch.load("gpt.pt")["model"]
    back = back.get("model", back)
    assert set(back) == set(given) and not all(torch.equal(back[key], given[key]) for key in given)


@pytest.mark.parametrize("name", [name for name, (_, config, _) in CASES.items() if config.kind in TOKENIZERS])
def test_only_convolutions_are_resized(name):
    config = CASES[name][1]
    other = resized(config, 64)
    if config.kind in ("titok", "alitok"):
        assert other == config
    else:
        assert other == replace(config, image_size=other.image_size)
        with torch.device("meta"):
            assert TOKENIZERS[config.kind][1](other).num_tokens == 64


def test_tokenize_at_another_size(files):
    cli.main(["convert", "vq.pt", "--to", "models/vq"])
    words = ["tokenize", "--tokenizer", "models/vq", "--data", "images", "--device", "cpu", "--views", "center"]
    cli.main([*words, "--image-size", "8", "--out", "tokens"])
    assert json.loads((files / "tokens" / "store.json").read_text())["num_tokens"] == 16

    with pytest.raises(SystemExit):
        cli.main([*words, "--image-size", "9", "--out", "odd"])
