"""Compiled parts: one graph for all blocks of a generator of every kind, and none more whatever is done with it."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY_VQ, picture
from contracts.test_generators import KINDS, LENGTH, make_condition, make_generator
from rounding import assert_rounding
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from consonar.errors import UserError
from consonar.generators.rear import ReARConfig
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.training import run as runs
from consonar.training.config import DataConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import compile_for_training, train
from consonar.training.tracking import read_metrics

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="g++")])
SUMMANDS = 1000
SAMPLER = SamplerConfig(guidance_scale=2.0)


@pytest.fixture(params=["aot_eager", INDUCTOR])
def counter(request):
    """A backend that counts the graphs it is given."""
    reset()
    yield CompileCounterWithBackend(request.param)
    reset()


def gradients(model, tokens, condition) -> torch.Tensor:
    """Of all parameters, in a row: some have none but by rounding (biases of keys)."""
    model.zero_grad()
    F.cross_entropy(model(tokens, condition)[0].flatten(0, 1), tokens.flatten()).backward()
    return torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", KINDS)
def test_all_blocks_are_one_graph_and_no_sampling_adds_to_it(name, rng, counter):
    if name == "janus":
        pytest.importorskip("transformers")
    model = make_generator(name).train()
    condition, tokens = make_condition(model, rng), torch.randint(32, (3, LENGTH), generator=rng)
    expected, keys = gradients(model, tokens, condition), list(model.state_dict())
    drawn = sample_tokens(model, condition, range(3), SAMPLER)
    for block in model.blocks:
        compile_for_training(block, backend=counter, fullgraph=True)
    assert_rounding(gradients(model, tokens, condition), expected, SUMMANDS)
    assert counter.frame_count == 1 < len(model.blocks) and list(model.state_dict()) == keys
    again = sample_tokens(model, condition, range(3), SAMPLER)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, drawn, strict=True))
    sample_tokens(model.eval(), condition, range(3), SAMPLER, num_tokens=5)
    with torch.no_grad():
        model(tokens[:, :3], condition)
    gradients(model.train(), tokens, condition)
    assert counter.frame_count == 1


@pytest.fixture
def run_configs(make_config, picture_folder, tmp_path):
    """By the number of graphs: that of the blocks, or those of a tokenizer's encoder and decoder."""
    measured = {"validate_every": 1, "sample_every": 1, "ema_decay": 0.5, "compile": True, "steps": 3}
    for index in range(12):
        folder = tmp_path / "labelled" / ("train", "validation")[index % 2] / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    labelled = DataConfig(images=str(tmp_path / "labelled"))
    start = train(make_config(loop={"steps": 1}), tmp_path / "start", quiet=True)
    model = ReARConfig(width=32, num_layers=3, num_heads=4, dropout=0.1)
    heads = AutoregressiveConfig(embedding_weight=1.0, head_width=16)
    policy = PolicyConfig(rewards={"mse": 1.0}, group_size=2, inner_epochs=2)
    plain = ReconstructionConfig(perceptual_weight=0, discriminator_weight=0.1, revive_after=1)
    return {
        "reAR": (1, make_config(model=model, objective=heads, loop=measured | {"accumulation": 2})),
        "post-training": (1, make_config(
            init=str(start), tokenizer=None, model=None, objective=policy, data=labelled,
            loop=measured | {"batch_size": 4, "fd_samples": 4},
        )),
        "tokenizer": (2, make_config(
            tokenizer=None, model=TINY_VQ, objective=plain, data=DataConfig(images=str(picture_folder)), loop=measured,
        )),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["reAR", "post-training", "tokenizer"])
def test_a_run_that_validates_and_shows_pictures_compiles_nothing_anew(
    name, run_configs, counter, tmp_path, monkeypatch
):
    graphs, config = run_configs[name]
    if name == "tokenizer" and counter.backend == "inductor":
        pytest.skip("its convolutions take minutes to compile")
    monkeypatch.setattr(runs, "compile_for_training", lambda part: compile_for_training(part, backend=counter))
    lines = read_metrics(train(config, tmp_path / "run", quiet=True) / "metrics.jsonl")
    assert counter.frame_count == graphs
    assert {line["step"] for line in lines if any(key.startswith("validation/") for key in line)} >= {2, 3}
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 2


def test_a_tokenizer_is_not_compiled_in_bf16_on_a_cpu(run_configs, tmp_path):
    config = run_configs["tokenizer"][1]
    with pytest.raises(UserError, match=r"^loop\.compile: .* set loop\.precision fp32"):
        train(replace(config, loop=replace(config.loop, precision="bf16")), tmp_path / "run", quiet=True)
