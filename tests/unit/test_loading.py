"""Loading a component folder: one copy of the weights, which is the caller's own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from consonar.components import load_generator, save_generator
from consonar.config_io import from_dict
from consonar.errors import UserError
from consonar.files.weights import load_module, map_tensors, read_tensors, save_component, save_tensors
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.origin import Origin
from consonar.training.config import TrainConfig

# Everything that is imported while a model is built counts before, not while the large one is loaded.
MEASURE = """
import json, sys
from pathlib import Path
from consonar.convert import convert
from consonar.components import load_generator

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))

folder = Path(sys.argv[1])
load_generator(folder / "small")
convert(folder / "small.pt", folder / "small-converted")
before = memory("VmRSS")
generator = load_generator(folder / "large")
total = float(sum(parameter.sum() for parameter in generator.parameters()))
loaded = memory("VmHWM") - before
del generator
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the largest so far begins anew
convert(folder / "large.pt", folder / "large-converted")
print(json.dumps([loaded, memory("VmHWM") - before, total]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_loading_and_converting_hold_one_copy(tmp_path):
    """The plain way, a module with random weights and a state dict, holds two."""
    config = ReARConfig(width=32, num_layers=1, num_heads=1, vocab_size=16, num_tokens=4, num_classes=3)
    # Many blocks, so that the largest tensor is a small part of the whole.
    for name, shape in (("small", config), ("large", replace(config, width=640, num_layers=8))):
        generator = ReARGenerator(shape)
        save_generator(generator, tmp_path / name, Origin())
        torch.save(generator.state_dict(), tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    loaded, converted, total = json.loads(done.stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 2e8
    assert total == pytest.approx(float(sum(p.detach().sum() for p in generator.parameters())))
    assert 0.8 < loaded / size < 1.2
    assert converted / size < 1.2


@pytest.fixture
def folder(tmp_path, tiny_generator):
    save_generator(tiny_generator(), tmp_path / "model", Origin(tokenizer="tiny-vq"))
    return tmp_path / "model"


def test_the_weights_outlive_their_file(folder):
    loaded = load_generator(folder)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))  # in place: a mapped file would change with it
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    path.write_bytes(content)
    with torch.no_grad():
        loaded.cls_token.add_(1)
    assert path.read_bytes() == content and torch.equal(load_generator(folder).cls_token, before["cls_token"])


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    load_generator(folder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_every_shape_and_type_is_read(shape, dtype, tmp_path):
    value = (torch.arange(35)[: max(1, torch.Size(shape).numel())] % 3).to(dtype)
    state = {"a": torch.ones(3), "b": value[: torch.Size(shape).numel()].reshape(shape), "c": torch.ones(2).half()}
    save_tensors(tmp_path / "x.safetensors", state)
    mapped = map_tensors(tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors", mapped, state)
    assert all(torch.equal(read[key], state[key]) and read[key].dtype == state[key].dtype for key in state)


class WithTable(nn.Module):
    """A module against the rule that derived tables are no buffers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(2.0), persistent=False)


def test_a_buffer_that_no_file_holds_is_our_mistake(tmp_path):
    save_component(tmp_path, {}, {"weight": torch.ones(2)})
    with pytest.raises(AssertionError, match=r"WithTable: .*without a value: \['table'\]"):
        load_module(WithTable, tmp_path)


def test_a_configuration_with_sizes_that_the_weights_cannot_have_is_refused_at_once(tmp_path):
    """A million layers would be built for hours before the weights are found to be others."""
    config = ReARConfig(width=8, num_layers=1, num_heads=1, vocab_size=16, num_tokens=4, num_classes=3)
    save_generator(ReARGenerator(config), tmp_path / "g", Origin())
    stored = json.loads((tmp_path / "g/config.json").read_text())
    for change, told in (({"num_layers": 900}, "more layers"), ({"width": 10**9}, "no model has these sizes")):
        (tmp_path / "g/config.json").write_text(json.dumps(stored | change))
        with pytest.raises(UserError, match=told):
            load_generator(tmp_path / "g")


@pytest.mark.parametrize("kind", [["rear"], {"rear": 1}, None])
def test_a_kind_that_is_no_text_is_refused_with_the_choices(kind, tmp_path):
    config = ReARConfig(width=8, num_layers=1, num_heads=1, vocab_size=16, num_tokens=4, num_classes=3)
    save_generator(ReARGenerator(config), tmp_path / "g", Origin())
    stored = json.loads((tmp_path / "g/config.json").read_text())
    (tmp_path / "g/config.json").write_text(json.dumps(stored | {"kind": kind}))
    with pytest.raises(UserError, match="kind: unknown"):
        load_generator(tmp_path / "g")
    with pytest.raises(UserError, match=r"model\.kind: unknown"):
        from_dict({"model": {"kind": kind}}, "a.yaml", TrainConfig)
