"""Tiny real models and data for all tests: nothing is mocked, nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from device.pretend import Log, pretended_cuda
from PIL import Image
from torch.nn import functional

from consonar import networks
from consonar.components import load_tokenizer, save_tokenizer
from consonar.cpu.kernels import tune
from consonar.data.tokenizing import write_token_store
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.records import Captions
from consonar.seeding import generator as seeded
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.optim import OptimConfig
from consonar.training.rewards import Rewards
from consonar.types import Grid, ImageBatch, ImageRecord

# One thread unless the environment says otherwise: tiny models are slower on several.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
# PyTorch's own ways unless the environment says otherwise: what a machine finds faster must not move a test.
os.environ.setdefault("CONSONAR_KERNELS", "pytorch")

NUM_CLASSES = 3
TINY_VQ = VQConfig(
    image_size=16, vocab_size=32, code_dim=4, base_channels=8, channel_multipliers=(1, 1, 2),
    latent_channels=8, num_groups=4,
)  # fmt: skip


def rated(rewards: Rewards, images: torch.Tensor, originals: torch.Tensor, grid: Grid | None = None):
    """`rewards.measure` of images of class 0, one or more for each of the originals; all should show a dog."""
    zeros = torch.zeros(len(originals), dtype=torch.int64)
    return rewards.measure(images, ImageBatch(originals, zeros, captions=Captions(["a dog"], zeros)), grid=grid)


def save_clip(folder: Path, words: list[str]) -> None:
    """A tiny random CLIP that knows these words, with its tokenizer, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    known = {word: i for i, word in enumerate(["<end>", "[UNK]", "[PAD]", *words])}
    text = {**small, "vocab_size": len(known), "max_position_embeddings": 8, "eos_token_id": 0, "bos_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for weight in model.parameters():  # so that pictures are told apart
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)


def picture(index: int, size: int = 16) -> Image.Image:
    """A coloured disc on noise; every index another picture."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (size, size, 3))
    y, x = np.mgrid[:size, :size]
    disc = (y - rng.integers(4, size - 4)) ** 2 + (x - rng.integers(4, size - 4)) ** 2 < rng.integers(9, 30)
    pixels[disc] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def save_pictures(root: Path, *, train: int = 12, validation: int = 6, size: int = 16) -> Path:
    """A folder of pictures in the classes a, b and c, with the splits train and validation; returns it."""
    for split, first, count in (("train", 0, train), ("validation", 100, validation)):
        for index in range(first, first + count):
            path = root / split / "abc"[index % 3] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(index, size).save(path)
    return root


def save_tokenizer_of_32(folder: Path) -> None:
    """An untrained tokenizer of 4 x 4 tokens for pictures of 32 px, the same at every call."""
    torch.manual_seed(0)
    save_tokenizer(VQTokenizer(replace(TINY_VQ, image_size=32, channel_multipliers=(1, 1, 2, 2)), name="tiny"), folder)


def same(ours: object, theirs: object) -> bool:
    """Whether two nested payloads hold the same, to the bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    return (
        torch.equal(ours, theirs)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
        else ours == theirs
    )


class Quarters:
    """A feature network without weights: the mean colours of four quarters."""

    name, weights_sha256, num_features = "quarters", "q" * 64, 12

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return functional.adaptive_avg_pool2d(images, 2).flatten(1).cpu()


@pytest.fixture
def quarters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Quarters` by its name, and a cache folder of the test's own."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.FEATURE_NETWORKS, "quarters", lambda device: Quarters())


class Pictures:
    """An `ImageSource` in memory: `count` pictures in `NUM_CLASSES` classes."""

    class_names: tuple[str, ...] | None = tuple("abc")

    def __init__(self, count: int, first: int = 0):
        self.name, self.count, self.first = "pictures", count, first

    def __iter__(self) -> Iterator[ImageRecord]:
        for index in range(self.first, self.first + self.count):
            yield ImageRecord(picture(index), f"picture {index}", index % NUM_CLASSES)


@pytest.fixture
def rng() -> torch.Generator:
    return seeded(0, "test")


@pytest.fixture
def images(rng: torch.Generator) -> torch.Tensor:
    """(2, 3, 16, 16) in [-1, 1]."""
    return torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1


@torch.no_grad()
def stir(model: torch.nn.Module, rng: torch.Generator, scale: float = 0.2) -> None:
    """Adds a draw to every weight, also to those that begin at zero or one, so that all of them tell."""
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=rng))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A component folder of an untrained tokenizer: 16 px, 4 x 4 tokens, 32 codes."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny-vq"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_tokenizer(VQTokenizer(TINY_VQ, name="tiny-vq"), folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> VQTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    """Folders of a training store (40 images) and a validation store (10)."""
    folder, tokenizer = tmp_path_factory.mktemp("stores"), load_tokenizer(tokenizer_folder)
    write_token_store(folder / "train", Pictures(40), tokenizer)
    write_token_store(folder / "validation", Pictures(10, first=100), tokenizer)
    return folder / "train", folder / "validation"


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNG files with a train and a validation part."""
    root = tmp_path_factory.mktemp("pictures")
    for split, first, count in (("train", 0, 24), ("validation", 100, 6)):
        (root / split / "all").mkdir(parents=True)
        for index in range(first, first + count):
            picture(index).save(root / split / "all" / f"{index:03d}.png")
    return root


def make_tiny_generator(num_layers: int = 2, dropout: float = 0.0, seed: int = 0, **sizes: int) -> ReARGenerator:
    """A generator whose every weight is drawn, so that no path is switched off by a zero initialisation."""
    sizes = {"vocab_size": 32, "num_tokens": 16, "num_classes": NUM_CLASSES} | sizes
    generator = ReARGenerator(ReARConfig(width=32, num_layers=num_layers, num_heads=4, dropout=dropout, **sizes))
    rng = seeded(seed, "tiny_generator")
    generator.reset_parameters(rng)
    stir(generator, rng)
    return tune(generator.eval())


@pytest.fixture
def tiny_generator() -> Callable[..., ReARGenerator]:
    return make_tiny_generator


@pytest.fixture
def make_config(stores: tuple[Path, Path], tokenizer_folder: Path) -> Callable[..., TrainConfig]:
    """Makes the configuration of a tiny plain AR run; keywords of `TrainConfig`, and `loop` and `optim` as dicts."""
    train, validation = stores
    base = TrainConfig(
        recipe="tiny",
        tokenizer=str(tokenizer_folder),
        model=ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.0),
        objective=AutoregressiveConfig(),
        data=DataConfig(tokens=str(train), validation_tokens=str(validation)),
        optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_steps=2),
        loop=LoopConfig(steps=6, batch_size=8, log_every=1, precision="fp32", device="cpu"),
    )

    def make(loop: dict | None = None, optim: dict | None = None, **changes: object) -> TrainConfig:
        config = replace(base, **changes)
        return replace(config, loop=replace(config.loop, **loop or {}), optim=replace(config.optim, **optim or {}))

    return make


@pytest.fixture
def cuda() -> Iterator[Log]:
    """One pretended CUDA device; its log of waits and copies."""
    if torch.cuda.is_available():
        pytest.skip("a real CUDA device is here: `make test-gpu`")
    with pretended_cuda() as log:
        yield log
