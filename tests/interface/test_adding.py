"""What a new thing takes: a module and a row. Each toy here is one, used as a user would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import extract_stack as stack
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, picture
from PIL import Image
from torch import Tensor, nn

import consonar
from consonar import cli, metrics
from consonar.attention import KVCache
from consonar.components import load_generator, load_tokenizer
from consonar.data.sources import SOURCES, SourceKind
from consonar.data.tokens import TokenStore
from consonar.evaluation.sample_metrics import SAMPLE_METRICS, Measured
from consonar.generators import GENERATORS
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.options import NotNegative
from consonar.recipes import RECIPES
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training import objectives
from consonar.training.config import DataConfig, TrainConfig
from consonar.training.objectives import METHODS, Method
from consonar.training.objectives.alignment import Alignment, AlignmentConfig, AlignmentTrainee, Forced
from consonar.training.rewards import REWARDS
from consonar.types import ImageBatch, ImageRecord, Kind

SOURCE = Path(consonar.__file__).parent
QUARTERS = ("--feature-network", "quarters")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch, quarters) -> Path:
    """A folder of labelled pictures to work in, where "quarters" is a network that is soon done."""
    for split, first, count in (("train", 0, 12), ("validation", 100, 6)):
        for index in range(first, first + count):
            path = tmp_path / "data" / split / "abc"[index % NUM_CLASSES] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(index).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A post-training method: its module.


@dataclass(frozen=True, kw_only=True)
class SharpenConfig(AlignmentConfig):
    """Raises the probability of the likeliest token."""

    kind: Literal["sharpen"] = "sharpen"
    strength: NotNegative = 1.0
    """Weight of the loss."""


class Sharpen(Alignment):
    config: SharpenConfig

    def loss(self, model: AlignmentTrainee, prepared: Forced, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        calls[:] = [
            f"{Path(one.filename).relative_to(SOURCE)}: {one.name}"
            for one in stack()
            if SOURCE in Path(one.filename).parents
        ]
        logits = model(prepared.context, prepared.condition).logits
        certainty = logits.log_softmax(-1).amax(-1).mean()
        return -self.config.strength * certainty, {"certainty": certainty}


calls: list[str] = []
"""The functions of the library, outer ones first, that were running when the loss was asked."""

# Its row, and its recipe.
ROW = Method(
    name="sharpening", config=SharpenConfig, objective=Sharpen, run="post-training",
    about="makes the likeliest token likelier", details=lambda settings: [f"strength {settings['strength']:g}"],
)  # fmt: skip


def sharpen_toy() -> TrainConfig:
    """The toy."""
    return replace(
        RECIPES["vapi-openmoji"](), recipe="sharpen-toy", objective=SharpenConfig(rewards={"mse": 1.0}),
        data=DataConfig(images="data"),
    )  # fmt: skip


def test_a_post_training_method(folder: Path, make_config, monkeypatch, capsys) -> None:
    monkeypatch.setattr(objectives, "METHODS", [*METHODS, ROW])
    monkeypatch.setitem(RECIPES, "sharpen-toy", sharpen_toy)
    start = consonar.train(make_config(loop={"steps": 2}), folder / "start", quiet=True)
    command = ["--init", str(start), "--loop.steps", "2", "--loop.batch-size", "4", "--loop.device", "cpu"]
    cli.main(["train", "sharpen-toy", "--out", "run", "--objective.strength", "2", *command])
    assert calls[0] == "cli/__init__.py: main" and len(calls) <= 5, calls
    Path("file.yaml").write_text("base: sharpen-toy\nobjective: {strength: 3.0}\n")
    cli.main(["train", "file.yaml", "--out", "again", *command])
    with pytest.raises(SystemExit):
        Path("wrong.yaml").write_text("base: sharpen-toy\nobjective: {kind: sharpn}\n")
        cli.main(["train", "wrong.yaml", "--out", "wrong", *command])
    assert "did you mean 'sharpen'?" in capsys.readouterr().err
    cli.main(["report", str(start), "run", "again", "--out", "page.html"])
    page = Path("page.html").read_text()
    assert "sharpening (strength 2), from start" in page and "makes the likeliest token likelier" in page


def test_a_reward(folder: Path, make_config, monkeypatch) -> None:
    def brightness(images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor:
        return images.mean((1, 2, 3))

    monkeypatch.setitem(REWARDS, "brightness", lambda resources: brightness)
    start = consonar.train(make_config(loop={"steps": 2}), folder / "start", quiet=True)
    cli.main([
        "train", "vapi-openmoji", "--init", str(start), "--data", "data", "--out", "run", "--objective.rewards",
        "brightness=1", "--loop.steps", "2", "--loop.batch-size", "4", "--loop.device", "cpu",
    ])  # fmt: skip
    cli.main(["report", str(start), "run", "--out", "page.html"])
    assert "reward: brightness" in Path("page.html").read_text()


def test_a_metric(folder: Path, make_config, monkeypatch, capsys) -> None:
    """A function of what is known of samples and reference, and what people call its number."""

    def gap(measured: Measured) -> float:
        mean, _, _ = measured.reference.target.gaussians["validation"]
        return float((measured.samples.moments.mean - mean).norm())

    monkeypatch.setitem(SAMPLE_METRICS, "gap", gap)
    row = metrics.Metric("gap", "gap between means", direction=-1)
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, row))
    run = consonar.train(make_config(loop={"steps": 2}), folder / "run", quiet=True)
    cli.main(
        ["evaluate", "run", *QUARTERS, "--reference", "data", "--num-samples", "8", "--draws", "2", "--device", "cpu"]
    )
    entry = json.loads((run / "results.json").read_text())["rows"][0]["metrics"]["gap"]
    assert entry["value"] > 0 and entry["spread"] > 0
    assert re.search(rf"gap +│ {entry['value']:.4g} ", capsys.readouterr().out)
    cli.main(["report", "run", "--out", "page.html"])
    page = Path("page.html").read_text()
    assert re.search(r"gap between means<br>[^/]*lower is better", page)


@dataclass(frozen=True, kw_only=True)
class GreyConfig(VQConfig):
    """A tokenizer of grey pictures."""

    kind: Literal["grey-vq"] = "grey-vq"  # type: ignore[assignment]


class GreyTokenizer(VQTokenizer):
    def pixels(self, codes: Tensor) -> Tensor:
        return super().pixels(codes).mean(1, keepdim=True).expand(-1, 3, -1, -1)


def test_a_trainable_tokenizer(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "grey-vq", Kind(GreyConfig, GreyTokenizer, trainable=True))
    Path("grey.yaml").write_text(
        "base: tokenizer-openmoji-64\n"
        "model: {kind: grey-vq, image_size: 16, vocab_size: 32, code_dim: 4, base_channels: 8, num_groups: 4}\n"
        "objective: {perceptual_weight: 0.0}\ndata: {images: data}\nloop: {steps: 2, batch_size: 4, device: cpu}\n"
    )
    cli.main(["train", "grey.yaml", "--out", "run"])
    images = load_tokenizer("run").decode(torch.zeros(1, 4, dtype=torch.int64))
    assert torch.equal(images[:, 0], images[:, 1])
    cli.main(["tokenize", "--tokenizer", "run", "--data", "data", "--out", "tokens", "--device", "cpu"])
    cli.main(["evaluate", "run", *QUARTERS, "--reference", "data", "--device", "cpu"])
    cli.main(["report", "run", "--out", "page.html"])


@dataclass(frozen=True, kw_only=True)
class BigramConfig(GeneratorConfig):
    """A generator that sees the last token alone."""

    kind: Literal["bigram"] = "bigram"
    width: int = 8
    num_layers: int = 1
    num_heads: int = 1
    num_classes: int = 0


class BigramBlock(nn.Linear):
    def forward(self, x: Tensor, needed: None, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        return x + super().forward(x)


class BigramGenerator(CausalGenerator[Tensor]):
    def __init__(self, config: BigramConfig):
        super().__init__(config, config.num_classes)
        self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList([BigramBlock(config.width, config.width)])
        self.output = nn.Linear(config.width, config.vocab_size)

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=rng)

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.num_classes)

    def hidden_states(self, context, condition, *, cache=None, tap_layers=()) -> tuple[Tensor, dict[int, Tensor]]:
        if cache is None or cache.length == 0:
            context = torch.cat([condition[:, None] + self.vocab_size, context], 1)
        return self.run_blocks(self.embeddings(context), None, None, cache, tap_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)


def test_a_generator(folder: Path, tokenizer_folder: Path, monkeypatch) -> None:
    """Its tokens are those of its table: the most likely one after each."""
    monkeypatch.setitem(GENERATORS, "bigram", Kind(BigramConfig, BigramGenerator))
    for name, part in (("tokens", "train"), ("held-out", "validation")):
        cli.main(["tokenize", "--tokenizer", str(tokenizer_folder), "--data", f"data/{part}", "--out", name])
    Path("bigram.yaml").write_text(
        f"base: rear-openmoji\ntokenizer: {tokenizer_folder}\nmodel: {{kind: bigram, width: 12}}\n"
        "data: {tokens: tokens, validation_tokens: held-out}\n"
        "loop: {steps: 3, batch_size: 4, validate_every: 2, save_every: 2, device: cpu}\n"
    )
    cli.main(["train", "bigram.yaml", "--out", "run"])
    cli.main(["sample", "run", "--classes", "0,2", "--temperature", "0", "--out", "samples.npz", "--device", "cpu"])
    model, tokens = load_generator("run"), np.load("samples.npz")["tokens"]
    following = torch.cat([torch.tensor([[0], [2]]) + 32, torch.from_numpy(tokens)], 1)
    table = model.output(model.blocks[0](model.embeddings.weight, None, None, None, 0)).argmax(-1)
    assert isinstance(model, BigramGenerator) and torch.equal(table[following[:, :-1]], following[:, 1:])
    cli.main(
        ["evaluate", "run", *QUARTERS, "--reference", "data", "--num-samples", "8", "--draws", "1", "--device", "cpu"]
    )
    cli.main(["report", "run", "--out", "page.html"])


class Greys:
    """Squares of one grey each, drawn at any size; dark ones are class 0."""

    class_names: tuple[str, ...] | None = ("dark", "light")

    def __init__(self, split: str, size: int):
        self.name, self.size, self.levels = f"greys/{split}@{size}", size, range(0 if split == "train" else 9, 250, 10)

    def __iter__(self) -> Iterator[ImageRecord]:
        for level in self.levels:
            yield ImageRecord(Image.new("RGB", (self.size,) * 2, (level,) * 3), f"grey {level}", int(level > 127))


def test_a_data_source(folder: Path, tokenizer_folder: Path, monkeypatch, capsys) -> None:
    kind = SourceKind(
        lambda _, split, size: Greys(split, size), splits=lambda _: ("train", "validation"), is_drawn=True
    )
    monkeypatch.setitem(SOURCES, "greys", kind)
    tokenizer = ["--tokenizer", str(tokenizer_folder), "--device", "cpu"]
    cli.main(["tokenize", *tokenizer, "--data", "greys", "--out", "tokens"])
    stores = [TokenStore.open(name) for name in ("tokens", "tokens-validation")]
    assert [len(store) for store in stores] == [25, 25] and stores[0].class_names == ("dark", "light")
    assert stores[0].source == "greys/train@16" and stores[0].labels.tolist() == [0] * 13 + [1] * 12
    argv = ["evaluate", "data/train", *QUARTERS, "--draws", "1", "--device", "cpu", "--out", "r.json"]
    cli.main([*argv, "--reference", "greys-16"])
    assert json.loads(Path("r.json").read_text())["num_reference"] == {"train": 25, "validation": 25}
    with pytest.raises(SystemExit):
        cli.main(["tokenize", *tokenizer, "--data", "grays", "--out", "t"])
    assert "'grays' is neither a folder nor a known source; choices: openmoji, PATH," in capsys.readouterr().err


HAD_TO_KNOW = {
    # A word that only what is about it needs, and the files of src that have it.
    "StraightThroughConfig": [
        "recipes/openmoji.py", "training/objectives/__init__.py", "training/objectives/controls.py",
    ],
    "FreePolicy": ["planning/update.py", "training/objectives/__init__.py", "training/objectives/free.py"],
    "absolute_errors": ["training/rewards.py"],
    "TiTokTokenizer": ["tokenizers/__init__.py", "tokenizers/titok.py"],
    "AliTokARGenerator": ["generators/__init__.py", "generators/alitok.py"],
    "open_dataset": ["data/cifar10.py", "data/huggingface.py", "data/sources.py"],
    "InceptionFeatures": ["networks/__init__.py", "networks/inception.py"],
    "spatial_distance_to": ["evaluation/sample_metrics.py"],
}  # fmt: skip


@pytest.mark.parametrize("word", HAD_TO_KNOW)
def test_few_files_know_of_each_thing(word: str) -> None:
    assert sorted(files_with(word)) == HAD_TO_KNOW[word]


def files_with(word: str) -> Iterator[str]:
    for path in SOURCE.rglob("*.py"):
        if re.search(rf"\b{word}\b", path.read_text()):
            yield path.relative_to(SOURCE).as_posix()
