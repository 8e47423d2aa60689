"""What `evaluate` holds on the device at once: batches, however many pictures there are."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from device import pretend
from torch import nn
from torch.nn import functional

from consonar.evaluation import evaluate as evaluating
from consonar.evaluation import inputs
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.inputs import ReferenceSet, SampleSet, as_input, encode_reference
from consonar.evaluation.kept import keep_reconstructions
from consonar.evaluation.reconstruction import reconstruction_metrics
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_npz
from consonar.sampling.pictures import bytes_of

BATCH, SIDE = 8, 16
PICTURES = BATCH * SIDE * SIDE * 3 * 4
"""Bytes of a batch as float32."""


class Cells(nn.Module):
    """Features, spatial ones and classes of 4 x 4 cells, with a weight that lies on a device."""

    name, weights_sha256, num_features, num_spatial = "cells", "p" * 64, 48, 48

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(images, SIDE // 4).flatten(1) * self.weight

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cells = self(images)
        return cells, cells, cells[:, :10].softmax(1)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The most bytes that pretended tensors held at once; views hold what they are views of."""
    alive, sizes, most, made = Counter[int](), dict[int, int](), [0], pretend.pretended

    def release(place: int) -> None:
        alive[place] -= 1
        if not alive[place]:
            del alive[place], sizes[place]

    def pretended(value: object) -> object:
        found = made(value)
        if pretend.is_pretended(found) and found is not value:
            storage = found.untyped_storage()
            place = storage.data_ptr()
            alive[place] += 1
            sizes[place] = storage.nbytes()
            most[0] = max(most[0], sum(sizes.values()))
            weakref.finalize(found, release, place)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(pretend, "pretended", pretended)
        yield most


def in_memory(name: str, count: int) -> ImageSet:
    images = np.random.default_rng(len(name) + count).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    labels = torch.arange(count) % 2
    return ImageSet(name, lambda size: (images[i : i + size] for i in range(0, count, size)), lambda: labels)


def held(monkeypatch: pytest.MonkeyPatch, count: int, tokenizer: nn.Module) -> list[int]:
    """The most bytes at once: of all metrics, of the tokens of a reference, of a tokenizer's metrics."""
    sets = {"train": in_memory("train", count), "validation": in_memory("held-out", count // 2)}
    samples = SampleSet(in_memory("samples", count), count, SIDE, "0", labels=torch.arange(count) % 2)
    wanted = ("fd", "fd-infinity", "fd-per-class", "sfd", "kid", "is", "precision", "density", "copy-rate")
    settings = EvaluationSettings(metrics=wanted, draws=2, batch_size=BATCH, device="cuda")
    network, found = Cells().to("cuda"), []
    with counted(monkeypatch) as most:
        results = evaluate(samples, ReferenceSet("known", sets), settings, feature_network=network)
        found.append(most[0])
    assert len(results.metrics) > len(wanted)
    with counted(monkeypatch) as most:
        encode_reference(ReferenceSet("known", sets), tokenizer, batch_size=BATCH)
        found.append(most[0])
    with counted(monkeypatch) as most:
        batches = (as_input(batch, tokenizer) for batch in sets["train"].stream(BATCH))
        reconstruction_metrics(tokenizer, batches, feature_network=network)
        found.append(most[0])
    return found


def test_the_device_holds_what_a_batch_takes_and_no_more_for_more_pictures(
    cuda, tokenizer, monkeypatch, tmp_path
) -> None:
    """So that 50,000 of 256 px take there what 64 of them do."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    codec = type(tokenizer)(tokenizer.config).to("cuda").eval()
    few, many = (held(monkeypatch, count, codec) for count in (24, 40))
    assert few == many
    assert PICTURES < few[0] < 4 * PICTURES, "the batch, and what it is made of"


def test_a_tokenizer_takes_a_batch_in_parts_that_fit(cuda, tokenizer, monkeypatch, tmp_path) -> None:
    """Whatever the batch size and the device: 64 pictures of 256 px took 10 GiB. The results are those of the batch."""
    wide = replace(tokenizer.config, base_channels=32)  # so that its maps are what takes memory, as in real ones
    codec = type(tokenizer)(wide).to("cuda").eval().requires_grad_(False)
    pictures = in_memory("train", BATCH)
    batches = [as_input(batch, codec) for batch in pictures.stream(BATCH)]
    whole = inputs.BUDGET
    monkeypatch.setattr(inputs, "of_tokenizer", lambda tokenizer: None)  # which reads the weights, after the pictures
    with torch.inference_mode():
        some = 2 * bytes_of(lambda: codec.decode(codec.encode(batches[0][:1])))
    found = []
    for budget in (whole, some):
        monkeypatch.setattr(inputs, "BUDGET", budget)
        taken = []
        with counted(monkeypatch) as most:
            tokens = encode_reference(ReferenceSet("known", {"train": pictures}), codec, batch_size=BATCH).tokens
            taken.append(most[0])
        with counted(monkeypatch) as most:
            metrics = reconstruction_metrics(codec, batches)
            taken.append(most[0])
        with counted(monkeypatch) as most:
            keep_reconstructions(tmp_path, codec, pictures, BATCH)
            taken.append(most[0])
        kept = read_npz(tmp_path / "reconstructions.npz", ["reconstructions"])["reconstructions"].astype(int)
        found.append((tokens["train"], metrics, kept, taken))
    (tokens, metrics, kept, taken), (same, near, close, less) = found
    assert all(bytes_ > some + PICTURES for bytes_ in taken), "or nothing had to be cut"
    assert all(bytes_ < some + PICTURES for bytes_ in less)
    assert torch.equal(tokens, same) and near == pytest.approx(metrics, rel=1e-5)
    assert np.abs(kept - close).max() <= 1


def test_a_reference_is_encoded_in_batches_of_the_size_that_is_asked_for(
    monkeypatch, tokenizer_folder, picture_folder
) -> None:
    monkeypatch.setattr(inputs, "encode_reference", lambda target, codec, **given: given["batch_size"])
    samples = SampleSet(in_memory("samples", 4), 4, SIDE, "0", tokens=torch.zeros(4, 16, dtype=torch.int64))
    settings = EvaluationSettings(batch_size=5)
    assert evaluating.open_target(samples, str(picture_folder), str(tokenizer_folder), settings) == 5
    unasked = replace(settings, metrics=("fd",))  # or of one set, which has no copy rate
    for place, how in ((picture_folder, unasked), (picture_folder / "train", settings)):
        target = evaluating.open_target(samples, str(place), str(tokenizer_folder), how)
        assert target.tokens is None and target.origin.tokenizer_fingerprint
