"""Compiled parts: one graph for all blocks of a generator of every kind, and none more whatever is done with it."""

import shutil

import pytest
import torch
from contracts.test_generators import KINDS, LENGTH, make_condition, make_generator
from rounding import assert_rounding
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.training.run import compile_for_training

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
