"""docs/own-models.md as a reader does it, and what is told of own models that do something else than they are to."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import save_pictures
from PIL import Image
from torch import nn

from consonar import cli
from consonar.cli.own_models import check_rows
from consonar.components import load_generator, load_tokenizer, save_generator, save_tokenizer
from consonar.errors import UserError
from consonar.generators import GENERATORS
from consonar.generators.base import GeneratorConfig
from consonar.generators.checked import checked_generator
from consonar.origin import Origin, of_tokenizer
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.checked import checked_tokenizer
from consonar.training.objectives.base import codebook_of
from consonar.training.origins import load_start
from consonar.types import Grid, Kind

PAGE = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Iterator[ModuleType]:
    """The module of the page, imported as `CONSONAR_MODELS` does it, in the folder where it lies."""
    (tmp_path / "my_models.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "my-films.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CONSONAR_MODELS", "my_models")
    kept = [(table, dict(table)) for table in (GENERATORS, TOKENIZERS)]
    sys.modules.pop("my_models", None)
    yield importlib.import_module("my_models")
    for table, rows in kept:
        table.clear()
        table.update(rows)
    sys.modules.pop("my_models", None)


def test_the_page_does_what_it_says(own, tmp_path) -> None:
    save_pictures(tmp_path / "photos", train=12, validation=4, size=40)
    save_tokenizer(own.Halves(own.HalvesConfig(), "halves"), "models/halves")
    short = ["--loop.steps", "2", "--loop.batch-size", "4", "--loop.validate-every", "2", "--loop.device", "cpu"]
    cli.main(["tokenize", "--tokenizer", "models/halves", "--data", "photos", "--out", "tokens", "--device", "cpu"])
    rear = ["--objective.embedding-weight", "0.5", "--objective.noise.schedule", "uniform"]
    cli.main(["train", "my-films.yaml", "--out", "runs/films", *rear, *short])
    pixels = ["--objective.rewards", "mse=1"]
    start = ["--init", "runs/films", "--data", "photos"]
    cli.main(["train", "vapi-openmoji", *start, "--out", "runs/vapi", *pixels, *short])
    cli.main(["sample", "runs/vapi", "--num-samples", "3", "--out", "samples.npz", "--device", "cpu"])
    with np.load("samples.npz") as drawn:
        assert drawn["arr_0"].shape == (3, 32, 32, 3) and drawn["tokens"].max() < 256
    assert type(load_generator("runs/vapi")).__name__ == "Film" and load_tokenizer("models/halves").name == "halves"
    assert Image.open(next(Path("photos/train").rglob("*.png"))).size == (40, 40)


def test_a_module_or_a_row_that_is_none_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setenv("CONSONAR_MODELS", "nowhere_at_all")
    with pytest.raises(SystemExit):
        cli.main(["recipes"])
    assert "CONSONAR_MODELS: 'nowhere_at_all': No module named" in capsys.readouterr().err

    @dataclass(frozen=True, kw_only=True)
    class Named(GeneratorConfig):
        kind: Literal["named"] = "named"

    for row, said in (
        (nn.Linear, r"TABLE\['mine'\]: give it as Kind\(configuration, model\), the first a GeneratorConfig"),
        (Kind(nn.Linear, nn.Linear), "the first a GeneratorConfig"),
        (Kind(Named, nn.Linear), r"TABLE\['mine'\]: Named.kind is 'named'; it is to be the same name"),
    ):
        with pytest.raises(UserError, match=said):
            check_rows("TABLE", {"mine": row}, GeneratorConfig)
    check_rows("TABLE", {"named": Kind(Named, nn.Linear)}, GeneratorConfig)


def wrong_tokens(method):
    return {"encode": lambda model, images: method(type(model).encode(model, images))}


def wrong_pixels(method):
    """Both ways of decoding, alike."""
    return {
        "decode_embeddings": lambda model, codes: method(type(model).decode_embeddings(model, codes)),
        "decode": lambda model, tokens: method(type(model).decode_embeddings(model, model.embed(tokens))),
    }


NOISE = seeded(0, "an encoder that draws")
BROKEN_TOKENIZERS = {
    "type": (wrong_tokens(torch.Tensor.float), r"encode gives torch.float32 of shape \(2, 64\), not torch.int64"),
    "grid of tokens": (wrong_tokens(lambda t: t.view(2, 8, 8)), r"encode gives torch.int64 of shape \(2, 8, 8\)"),
    "beyond": (wrong_tokens(lambda t: t + 256), r"encode gives tokens \d+\.\.\d+ with vocab_size 256"),
    "drawn": (wrong_tokens(lambda t: (t + torch.randint(9, (1,), generator=NOISE)) % 256), "encode gives other tokens"),
    "vocabulary": ({"vocab_size": 1000}, "embed has no token 999: vocab_size 1000"),
    "one code": ({"vocab_size": 1}, "vocab_size 1: a generator has nothing to choose from"),
    "cells": ({"grid": Grid(4, 4)}, r"Grid\(rows=4, columns=4, prefix=0\) is not of num_tokens 64"),
    "width": ({"code_dim": 5}, r"embed gives torch.float32 of shape \(2, 64, 8\), not floating .* \(2, 64, 5\)"),
    "unit range": (
        wrong_pixels(lambda p: p.flatten(1).softmax(1).view_as(p)),
        r"decode gives no pixel below 0, of a black .* not \[0, 1\]",
    ),
    "side": ({"image_size": (32, 32)}, r"image_size \(32, 32\), not the side"),
    "one-hot codes": (
        {"embed": lambda model, t: nn.functional.one_hot(t, 200)[..., :8].float()},
        "embed has no token 255",
    ),
    "mixed codes": (
        {"encode": lambda model, images: type(model).encode(model, images - images.mean(0))},
        "the tokens of an image depend on the others of its batch",
    ),
    "mixed pictures": (wrong_pixels(lambda p: p - p.mean(0)), "a picture depends on the others of its batch"),
    "drawn pictures": (
        wrong_pixels(lambda p: p + 0.2 * torch.randn(p.shape, generator=NOISE)),
        "decode gives other pictures for the same tokens",
    ),
    "bytes' range": (wrong_pixels(lambda p: (p + 1) * 127.5), r"decode gives pixels from .*, not in \[-1, 1\]"),
    "bytes": (wrong_pixels(lambda p: p.clamp(0, 1).mul(255).byte()), "decode gives torch.uint8 of shape"),
    "channels": (
        wrong_pixels(lambda p: p.permute(0, 2, 3, 1)),
        r"decode gives torch.float32 of shape \(2, 32, 32, 3\)",
    ),
    "NaN": (wrong_pixels(lambda p: p * torch.nan), "decode gives numbers that are not finite"),
    "another decoder": ({"decode": lambda model, t: -model.decode_embeddings(model.embed(t))}, r"are \S+ apart"),
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_an_own_tokenizer_that_would_go_on_with_wrong_numbers_is_told(own, name) -> None:
    changed, said = BROKEN_TOKENIZERS[name]
    torch.manual_seed(0)
    tokenizer = own.Halves(own.HalvesConfig(), "halves")
    assert checked_tokenizer(tokenizer, "mine") is tokenizer
    for key, value in changed.items():
        setattr(tokenizer, key, value.__get__(tokenizer) if callable(value) else value)
    with pytest.raises(UserError, match=f"^tokenizer: mine: .*{said}"):
        checked_tokenizer(tokenizer, "mine")


def film(own) -> nn.Module:
    config = own.FilmConfig(width=16, num_layers=2, vocab_size=32, num_tokens=8, num_classes=3)
    generator = own.Film(config)
    generator.reset_parameters(seeded(0, "film"))
    return generator


def sees_itself(model, context, condition, *, cache=None, tap_layers=()):
    hidden, taps = model.hidden_states(context, condition, cache=cache, tap_layers=tap_layers)
    return model.logits(hidden[:, -context.shape[1] :] if cache is None else hidden[:, -1:]), taps


def forgets(model, context, condition, *, cache=None, tap_layers=()):
    if cache is not None:
        cache.data.zero_()
    return type(model).forward(model, context, condition, cache=cache, tap_layers=tap_layers)


def one_more(model, *args, **settings):
    logits, taps = type(model).forward(model, *args, **settings)
    return nn.functional.pad(logits, (0, 1)), taps


def mixes(model, context, condition, *, cache=None, tap_layers=()):
    logits, taps = type(model).forward(model, context, condition, cache=cache, tap_layers=tap_layers)
    return logits + logits.mean(0), taps


def forgets_later(model, context, condition, *, cache=None, tap_layers=()):
    if cache is not None and cache.read > 5:
        cache.data[..., 1:3, :] = 0
    return type(model).forward(model, context, condition, cache=cache, tap_layers=tap_layers)


BROKEN_GENERATORS = {
    "itself": (sees_itself, r"logits\[:, i\] depend on token i or later ones: seen at token 4"),
    "cache": (forgets, "with a cache the logits of token 1 are others"),
    "window": (forgets_later, "with a cache the logits of token 6 are others"),
    "batch": (mixes, "the logits of an image depend on the others of its batch"),
    "vocabulary": (one_more, r"logits of shape \(2, 8, 33\), not \(B, N, V\), here \(2, 8, 32\)"),
    "taps": (
        lambda model, *args, **s: (type(model).forward(model, *args, **s)[0], {}),
        r"tap_layers \(1,\): no hidden",
    ),
}


@pytest.mark.parametrize("name", BROKEN_GENERATORS)
def test_an_own_generator_that_would_go_on_with_wrong_numbers_is_told(own, name) -> None:
    forward, said = BROKEN_GENERATORS[name]
    generator = film(own)
    nn.init.normal_(generator.head.weight, generator=seeded(1, "film"))
    assert checked_generator(generator, "mine") is generator
    generator.forward = forward.__get__(generator)
    with pytest.raises(UserError, match=f"^generator: mine: {said}"):
        checked_generator(generator, "mine")


def test_a_head_of_zeros_hides_nothing(own) -> None:
    generator = film(own)
    nn.init.zeros_(generator.head.weight)
    assert checked_generator(generator, "mine") is generator
    run_blocks = type(generator).run_blocks
    generator.run_blocks = lambda x, c, mask, cache, taps: run_blocks(
        generator, x, c, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool) if cache is None else mask, cache, taps
    )
    with pytest.raises(UserError, match="depend on token i or later ones: seen at token 4, in the hidden states"):
        checked_generator(generator, "mine")


@pytest.mark.parametrize("change", ["clamped", "black", "bright", "wide"])
def test_an_own_tokenizer_that_is_right_is_taken(own, change) -> None:
    torch.manual_seed(0)
    tokenizer = own.Halves(own.HalvesConfig(), "halves")
    plain = tokenizer.decode_embeddings
    pixels = {
        "clamped": lambda codes: plain(codes).mul(9),
        "black": lambda codes: plain(codes).mul(0),  # untrained
        "bright": lambda codes: plain(codes).mul(0.1).add(0.8),  # of a domain without dark pictures
        "wide": lambda codes: plain(codes).clamp(-1, 1).mul(1.2),
    }[change]
    tokenizer.decode_embeddings = lambda codes: pixels(codes).clamp(-1.9, 1.9)
    tokenizer.decode = lambda tokens: pixels(tokenizer.embed(tokens)).clamp(-1, 1)
    assert checked_tokenizer(tokenizer, "mine") is tokenizer


def more(base: type, **made):
    """The class with more in it than weights: each is made from the model."""

    def init(self, *args, **settings):
        base.__init__(self, *args, **settings)
        for key, make in made.items():
            make(self, key)

    return type(base.__name__, (base,), {"__init__": init})


def buffer(value, **settings):
    return lambda model, key: model.register_buffer(key, value(), **settings)


KEPT = {
    "whole numbers": buffer(lambda: torch.arange(9)),
    "complex": buffer(lambda: torch.polar(torch.ones(9), torch.arange(9.0))),
    "not kept": buffer(lambda: torch.arange(9), persistent=False),
    "plain tensor": lambda model, key: setattr(model, key, torch.arange(9)),
    "numbers of a tensor": lambda model, key: setattr(model, key, [x.item() for x in torch.linspace(0, 1, 3)]),
    "batch norm": lambda model, key: setattr(model, key, nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_pytorch_knows_besides_weights_is_stored_and_loaded(own, tmp_path, name) -> None:
    for table, kind, config in ((TOKENIZERS, "halves", own.HalvesConfig), (GENERATORS, "film", own.FilmConfig)):
        table[kind] = Kind(config, more(table[kind].model, kept=KEPT[name]))
    tokenizer = TOKENIZERS["halves"].model(own.HalvesConfig(), "halves")
    if name == "batch norm":
        tokenizer.kept(torch.rand(2, 3, 4, 4))
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    shape = own.FilmConfig(width=16, num_layers=2, vocab_size=32, num_tokens=8, num_classes=3)
    save_generator(GENERATORS["film"].model(shape), tmp_path / "generator", Origin(tokenizer="x"))
    state = torch.get_rng_state()
    loaded = load_tokenizer(tmp_path / "tokenizer"), load_generator(tmp_path / "generator")
    assert torch.equal(state, torch.get_rng_state())
    for model in loaded:
        like = tokenizer.kept
        if isinstance(like, torch.Tensor):
            assert model.kept.dtype == like.dtype and torch.equal(model.kept, like)
        elif isinstance(like, nn.Module):
            assert model.kept.num_batches_tracked.dtype == torch.int64
        else:
            assert model.kept == like
    assert loaded[0].fingerprint == tokenizer.fingerprint


def test_tied_weights_are_stored_and_stay_tied(own, tmp_path) -> None:
    def tie(model, key):
        model.head = nn.Linear(16, 32, bias=False)
        model.head.weight = model.tokens.weight

    GENERATORS["film"] = Kind(own.FilmConfig, more(own.Film, tied=tie))
    shape = own.FilmConfig(width=16, num_layers=2, vocab_size=32, num_tokens=8, num_classes=3)
    generator = GENERATORS["film"].model(shape)
    codec = own.Halves(own.HalvesConfig(), "halves")
    save_tokenizer(codec, tmp_path / "halves")
    save_generator(generator, tmp_path / "film", of_tokenizer(codec))
    loaded, start = load_generator(tmp_path / "film"), load_start(str(tmp_path / "film"), shape, codec)
    for model in (loaded, start):
        assert model.head.weight is model.tokens.weight and torch.equal(model.head.weight, generator.head.weight)


def test_what_needs_a_codebook_is_refused_where_a_vector_depends_on_its_place(own) -> None:
    tokenizer = own.Halves(own.HalvesConfig(), "halves")
    table = codebook_of(tokenizer, torch.device("cpu"))
    assert torch.equal(table[[3, 77]], tokenizer.embed(torch.tensor([[3, 77]]))[0])
    places = torch.arange(64) % 2 == 0  # two levels in turn, as of a residual quantiser
    plain = tokenizer.embed
    tokenizer.embed = lambda tokens: plain(tokens) * torch.where(places, 1.0, 0.5)[: tokens.shape[1], None]
    with pytest.raises(
        UserError, match=r"depends on the token's place, so that there is no codebook; straight-through"
    ):
        codebook_of(tokenizer, torch.device("cpu"))
