"""Who draws numbers and who decides on a device stands in one place each, read from the source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import consonar
from consonar.distributed import pick_device
from consonar.records import device_of, to_device
from consonar.sampling.sample import SamplerConfig
from consonar.types import TextCondition, TokenBatch

SOURCE = Path(consonar.__file__).parent
SEAMS = {
    r"torch\.(rand|randint|randperm|bernoulli|multinomial)\(|torch\.Generator\(|\.\w+_\(.*generator=": "seeding.py",
    r"cuda\.is_available\(": "distributed.py",
    r"allow_tf32|fp32_precision|matmul_precision\(": "float32.py",
}


@pytest.mark.parametrize("pattern", SEAMS)
def test_it_stands_in_one_place(pattern: str) -> None:
    files = {path for path in SOURCE.rglob("*.py") for line in path.open() if found(pattern, line)}
    assert {path.relative_to(SOURCE).as_posix() for path in files} == {SEAMS[pattern]}


def found(pattern: str, line: str) -> bool:
    """Initial weights are drawn by `nn.init`, on the CPU, before a model goes anywhere."""
    return bool(re.search(pattern, line)) and "nn.init." not in line


def test_the_device_is_picked_and_the_process_is_left_as_it_is(cuda) -> None:
    assert torch.backends.cudnn.allow_tf32  # PyTorch's default
    assert pick_device("cpu") == torch.device("cpu") and pick_device() == torch.device("cuda", 0)
    assert torch.backends.cudnn.allow_tf32


def test_a_record_moves_whole_and_without_waiting(cuda) -> None:
    condition = TextCondition(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    record = {"batch": TokenBatch(torch.zeros(2, 4), condition), "kept": 3}
    moved = to_device(record, torch.device("cuda", 0))
    assert moved["batch"].tokens.is_cuda and moved["batch"].condition.mask.is_cuda
    assert moved["kept"] == 3 and moved["batch"].indices is None and not cuda.waits
    assert to_device(SamplerConfig(), torch.device("cuda", 0)) == SamplerConfig()
    expanded = to_device(torch.ones(1, 3).expand(2, 3), torch.device("cuda", 0))
    assert expanded.is_cuda and expanded.shape == (2, 3) and not cuda.waits
    back = to_device(moved, torch.device("cpu"))
    assert not back["batch"].tokens.is_cuda and cuda.waits  # what is read on the CPU is there


def test_the_device_of_a_model_is_that_of_its_weights(cuda) -> None:
    assert device_of(torch.nn.Linear(2, 2).to("cuda")) == torch.device("cuda", 0)
    assert device_of(torch.nn.ReLU()) == device_of(object()) == torch.device("cpu")
