"""Compiled parts: one graph for all blocks of a generator of every kind, and none more whatever is done with it; one
for what a tokenizer of every kind makes of a batch."""

import shutil
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY_VQ, Pictures, save_pictures
from contracts.test_generators import KINDS, LENGTH, make_condition, make_generator
from device.test_models import TOKENIZER_CASES, make_tokenizer
from rounding import assert_rounding
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from consonar import cli
from consonar.compiling import compile_for_training, compiled
from consonar.components import save_generator
from consonar.data.tokenizing import write_token_store
from consonar.errors import UserError
from consonar.generators.rear import ReARConfig
from consonar.origin import of_tokenizer
from consonar.sampling.job import Job, run_job
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.training import best
from consonar.training import run as runs
from consonar.training.config import DataConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train
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
def run_config(request, make_config, picture_folder, tmp_path):
    """The run of a name, by the number of graphs: that of the blocks, or those of a tokenizer's encoder and decoder."""
    measured = {"validate_every": 1, "sample_every": 1, "ema_decay": 0.5, "compile": True, "steps": 3}
    if request.param == "reAR":
        model = ReARConfig(width=32, num_layers=3, num_heads=4, dropout=0.1)
        heads = AutoregressiveConfig(embedding_weight=1.0, head_width=16)
        return 1, make_config(model=model, objective=heads, loop=measured | {"accumulation": 2})
    if request.param == "tokenizer":
        plain = ReconstructionConfig(perceptual_weight=0, discriminator_weight=0.1, revive_after=1)
        model, data = replace(TINY_VQ, channel_multipliers=(1, 2)), DataConfig(images=str(picture_folder))
        return 2, make_config(tokenizer=None, model=model, objective=plain, data=data, loop=measured)
    labelled = save_pictures(tmp_path / "labelled", train=6)
    start = train(make_config(loop={"steps": 1}), tmp_path / "start", quiet=True)
    policy = PolicyConfig(rewards={"mse": 1.0}, group_size=2, inner_epochs=2)
    return 1, make_config(
        init=str(start), tokenizer=None, model=None, objective=policy, data=DataConfig(images=str(labelled)),
        loop=measured | {"batch_size": 4, "fd_samples": 4},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("run_config", "counter"),
    # Graphs are the front end's; that blocks have gradients in one is asked above. The convolutions of a tokenizer
    # would take inductor minutes.
    [("reAR", "eager"), ("post-training", "eager"), ("tokenizer", "aot_eager"),
     pytest.param("reAR", *INDUCTOR.values, marks=INDUCTOR.marks),
     pytest.param("post-training", *INDUCTOR.values, marks=INDUCTOR.marks)],
    indirect=True,
)  # fmt: skip
def test_a_run_that_validates_and_shows_pictures_compiles_nothing_anew(
    run_config, counter, quarters, tmp_path, monkeypatch
):
    graphs, config = run_config
    monkeypatch.setattr(best, "NETWORK", "quarters")
    monkeypatch.setattr(runs, "compile_for_training", lambda part: compile_for_training(part, backend=counter))
    lines = read_metrics(train(config, tmp_path / "run", quiet=True) / "metrics.jsonl")
    assert counter.frame_count == graphs
    assert {line["step"] for line in lines if any(key.startswith("validation/") for key in line)} >= {2, 3}
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 2


@pytest.mark.parametrize("run_config", ["tokenizer"], indirect=True)
def test_a_tokenizer_is_not_compiled_in_bf16_on_a_cpu(run_config, tmp_path):
    config = run_config[1]
    with pytest.raises(UserError, match=r"^loop\.compile: .* set loop\.precision fp32"):
        train(replace(config, loop=replace(config.loop, precision="bf16")), tmp_path / "run", quiet=True)


QUICK = pytest.param("eager", id="traced")  # the compiler's front end: graphs and their count
NETWORKS = [name for name in TOKENIZER_CASES if name not in ("vqgan-plus, cosine", "vqgan-plus, signs")]
"""Tokenizers that differ in more than the search."""


@pytest.mark.parametrize("backend", [QUICK, INDUCTOR])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tokenizer_makes_the_same_by_one_graph_for_its_batch(name, backend, rng):
    """The fewer rows of a last batch are not compiled for, and the tokenizer that was given stays as it was."""
    reset()
    counter, written = CompileCounterWithBackend(backend), make_tokenizer(name)
    images = torch.rand(5, 3, 16, 16, generator=rng) * 2 - 1
    with torch.inference_mode():
        tokens = written.encode(images)
        for method, run, given in (("latents", "vectors", images), ("pixels", "decode", tokens)):
            before, own = counter.frame_count, compiled(written, method, backend=counter, fullgraph=True)
            for part in (given[:2], given[2:4], given[4:]):
                assert_rounding(getattr(own, run)(part), getattr(written, run)(part), SUMMANDS)
            assert counter.frame_count == before + 1 and method not in vars(written)
    assert own.fingerprint == written.fingerprint


def test_jobs_compile_once_and_find_the_same(tokenizer, tiny_generator, tmp_path, monkeypatch):
    """Samples in two shards with a shorter last batch, and a store."""
    reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    labels, found = torch.arange(9) % 3, []
    for compile in (False, True):
        job = Job(tiny_generator(), tokenizer, labels, seed=0, sampler=SAMPLER, source="run", compile=compile)
        drawn = np.load(run_job(job, tmp_path / f"{compile}.npz", batch_size=2, shard_size=6))
        store = write_token_store(tmp_path / f"store {compile}", Pictures(9), tokenizer, batch_size=4, compile=compile)
        found.append((drawn, store.read(torch.arange(9), torch.zeros(9, dtype=torch.int64))))
        assert counter.frame_count == (2 if compile else 0)
    (samples, tokens), (others, theirs) = found
    assert np.array_equal(samples["tokens"], others["tokens"])
    assert np.abs(samples["arr_0"].astype(int) - others["arr_0"]).max() <= 1  # a level
    assert torch.equal(tokens, theirs)


class Doubling:
    """A model of one method."""

    def twice(self, x):
        return 2 * x


def test_where_compiling_fails_that_is_said_once_and_costs_no_picture():
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nis here")

    own, batch = compiled(Doubling(), "twice", backend=broken), torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"Doubling\.twice is not compiled, which is slower: .*no compiler is here"):
        assert torch.equal(own.twice(batch), 2 * batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own.twice(batch), 2 * batch)


def test_more_rows_than_before_are_compiled_for_and_fewer_are_not():
    counter = CompileCounterWithBackend("eager")
    own = compiled(Doubling(), "twice", backend=counter)
    for rows, graphs in ((2, 1), (1, 1), (3, 2), (3, 2), (2, 2)):
        assert torch.equal(own.twice(torch.ones(rows, 3)), torch.full((rows, 3), 2.0)) and counter.frame_count == graphs


def test_memory_that_is_missing_is_no_fault_of_the_compiler():
    def refuse(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.62 GiB.")

    with pytest.raises(Exception, match=r"out of memory"):
        compiled(Doubling(), "twice", backend=refuse).twice(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"^compile: a Doubling has no method 'pixels'"):
        compiled(Doubling(), "pixels")


def test_the_commands_compile_where_they_are_asked_to(
    tokenizer, tokenizer_folder, tiny_generator, picture_folder, tmp_path, monkeypatch
):
    asked: list[str] = []
    for module in ("sampling.pictures", "data.tokenizing"):
        monkeypatch.setattr(f"consonar.{module}.compiled", lambda model, name: asked.append(name) or model)
    save_generator(
        tiny_generator(), tmp_path / "model", replace(of_tokenizer(tokenizer), tokenizer=str(tokenizer_folder))
    )
    for more in ([], ["--compile"]):
        common = ["--batch-size", "4", "--device", "cpu", *more]
        cli.main(["sample", str(tmp_path / "model"), "--out", str(tmp_path / f"{len(more)}.npz"), *common])
        out = str(tmp_path / f"store {len(more)}")
        cli.main(
            ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(picture_folder), "--out", out, *common]
        )
        assert asked == ["pixels", "latents", "latents"][: 3 * len(more)]
