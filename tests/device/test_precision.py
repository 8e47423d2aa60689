"""What jobs on the device multiply in, and what they wait for: batches are decoded beside the next one's tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Pictures
from torch import nn

from consonar.data.tokenizing import write_token_store
from consonar.evaluation.inputs import ReferenceSet, encode_reference, folder_image_set
from consonar.float32 import in_float32
from consonar.sampling import pictures
from consonar.sampling.sample import SamplerConfig, sample
from consonar.training.run import train

CUDA = torch.device("cuda", 0)
FINITE = ("number", "sampling/decoder.py:finish")
HERE = ("event", "records.py:here")
LABELS = torch.arange(12) % 3
MAP = pictures.LIVE_MAPS * 8 * 16 * 16 * 4
"""Bytes that decoding a picture is taken to need: its largest map has 8 channels of 16 x 16 px in float32."""


@pytest.fixture
def seen(monkeypatch) -> Counter[tuple[str, str, torch.dtype]]:
    """By layer, what float32 products may be rounded to when it is called, and the type of its weights."""
    counts: Counter[tuple[str, str, torch.dtype]] = Counter()

    def look(module: nn.Module, inputs: object) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            part = torch.backends.cuda.matmul if isinstance(module, nn.Linear) else torch.backends.cudnn.conv
            weight = torch.bfloat16 if torch.is_autocast_enabled("cpu") else module.weight.dtype
            counts[type(module).__name__, part.fp32_precision, weight] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    yield counts
    hook.remove()


def rounded(seen: Counter[tuple[str, str, torch.dtype]]) -> set[tuple[str, torch.dtype]]:
    return {(precision, dtype) for _, precision, dtype in seen}


EXACT, LOW, TF32 = ("ieee", torch.float32), ("ieee", torch.bfloat16), ("tf32", torch.float32)


def test_samples_are_bf16_unless_told(cuda, seen, tiny_generator, tokenizer) -> None:
    generator = tiny_generator()
    models = generator.to(CUDA), tokenizer.to(CUDA)
    for name, expected in (("auto", LOW), ("fp32", EXACT), ("tf32", TF32)):
        seen.clear()
        drawn = sample(*models, LABELS, batch_size=4, precision=name)
        assert rounded(seen) == {expected} and drawn.precision == ("bf16" if name == "auto" else name)
        assert not drawn.images.is_cuda and not drawn.tokens.is_cuda and drawn.images.dtype == torch.float32
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default, as before


def test_convolutions_in_bf16_have_their_channels_innermost(cuda, tokenizer) -> None:
    from consonar.precision import with_weights

    low = with_weights(tokenizer.to(CUDA), "bf16", CUDA)
    weight = low.decoder.conv_in.weight
    assert weight.is_cuda and weight.is_contiguous(memory_format=torch.channels_last)
    assert not tokenizer.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_samples_is_waited_for_twice(cuda, tiny_generator, tokenizer) -> None:
    """For its tokens, whose logits might not have been finite, and for its pictures when the next tokens were drawn."""
    models = tiny_generator().to(CUDA), tokenizer.to(CUDA)
    config = SamplerConfig(guidance_scale=2.0)
    expected = sample(*models, LABELS, config=config)
    cuda.clear()
    drawn = sample(*models, LABELS, config=config, batch_size=4)
    assert cuda.waits == {FINITE: 3, HERE: 3}
    assert torch.equal(drawn.tokens, expected.tokens)


@pytest.mark.parametrize(("free", "calls"), [(2**30, [5]), (3 * 2 * MAP, [3, 2]), (0, [1, 1, 1, 1, 1])])
def test_as_many_pictures_are_decoded_at_once_as_fit(
    cuda, monkeypatch, tiny_generator, tokenizer, free: int, calls: list[int]
) -> None:
    """Of one size: five of which three or four fit are three and two."""
    models, decode, sizes = (tiny_generator().to(CUDA), tokenizer.to(CUDA)), type(tokenizer).decode, []
    expected = sample(*models, LABELS[:5], precision="fp32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**31))
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda model, tokens: (sizes.append(len(tokens)), decode(model, tokens))[1]
    )
    drawn = sample(*models, LABELS[:5], precision="fp32")
    assert sizes == [1, *calls]  # the first for the room that it takes
    torch.testing.assert_close(drawn.images, expected.images, rtol=0, atol=1e-5)


def test_the_largest_map_decides_how_many_fit(cuda, monkeypatch, tokenizer) -> None:
    on_device = tokenizer.to(CUDA)
    tokens = torch.zeros(9, 16, dtype=torch.int64).to(CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 5 * MAP, 2**31))
    with torch.inference_mode():
        assert pictures.images_at_once(on_device, tokens) == 5
        assert pictures.images_at_once(tokenizer.to("cpu"), tokens.to("cpu")) >= 9


def test_tokenising_waits_once_for_a_batch(cuda, seen, tokenizer, tmp_path: Path) -> None:
    on_device = tokenizer.to(CUDA)
    for name, expected in (("fp32", EXACT), ("tf32", TF32), ("bf16", LOW)):
        seen.clear()
        cuda.clear()
        store = write_token_store(tmp_path / name, Pictures(6), on_device, batch_size=2, precision=name)
        assert rounded(seen) == {expected} and store.metadata.precision == name
        fingerprints = {key: count for key, count in cuda.waits.items() if key[1].startswith("files/weights.py")}
        assert dict(cuda.waits) == {**fingerprints, HERE: 3}
        assert cuda.copies["to the device", "records.py:<lambda>"] == 3


def test_a_reference_is_encoded_in_float32(cuda, seen, tokenizer, picture_folder: Path) -> None:
    reference = ReferenceSet("x", {"train": folder_image_set(picture_folder / "train" / "all")[0]})
    encode_reference(reference, tokenizer.to(CUDA))
    assert rounded(seen) == {EXACT}


def test_what_is_float32_is_so_inside_a_job_in_tf32(cuda) -> None:
    from consonar.precision import multiplying

    @in_float32
    def inside(x: torch.Tensor) -> str:
        return torch.backends.cuda.matmul.fp32_precision

    with multiplying("tf32", CUDA):
        assert inside(torch.ones(1).to(CUDA)) == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize(("name", "expected"), [("tf32", TF32), ("fp32", EXACT), ("auto", LOW)])
def test_steps_are_in_the_precision_of_the_run_and_the_rest_in_float32(
    cuda, seen, make_config, tmp_path: Path, name: str, expected: tuple[str, torch.dtype]
) -> None:
    config = make_config(loop={"device": "cuda", "precision": name, "steps": 2})
    train(config, tmp_path / "run", stop_at=1, quiet=True)
    assert rounded(seen) == {expected}
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert rounded(seen) == {expected, EXACT, LOW}  # validation; the picture at the end is of samples
    train(config, tmp_path / "run", resume=True, quiet=True)  # is done: no session of its own
    sessions = json.loads((tmp_path / "run" / "sessions.json").read_text())["sessions"]
    chosen = "bf16" if name == "auto" else name
    assert [(one["step"], one["precision"], one["machine"]) for one in sessions] == [
        (0, chosen, "a pretended device"), (1, chosen, "a pretended device"),
    ]  # fmt: skip
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # as before
