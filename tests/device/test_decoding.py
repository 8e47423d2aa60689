"""Decoding with one graph a token: the tokens of the CPU, by a step that is captured once and waits for nothing."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_generator
from contracts.test_generators import KINDS, LLAMAGEN, make_condition, make_generator
from device import graphs
from device.test_models import CUDA, SAMPLERS

from consonar import records
from consonar.attention import KVCache
from consonar.generators.llamagen import LlamaGenGenerator
from consonar.records import to_device
from consonar.sampling import decoder as decoding
from consonar.sampling.decoder import Batch
from consonar.sampling.job import Job, run_job
from consonar.sampling.sample import decoder_of, draw_batch, sample_tokens
from consonar.seeding import generator as seeded
from consonar.types import PromptCondition

GUIDED = SAMPLERS["guided"]


@pytest.fixture(params=KINDS)
def model(request):
    return make_generator(request.param)


@pytest.fixture
def condition(model, rng):
    return make_condition(model, rng)


@pytest.fixture(autouse=True)
def several_lengths(monkeypatch):
    """Keys are read up to multiples of 8, so that a batch of 16 tokens has several graphs; nothing falls back."""
    monkeypatch.setattr(decoding, "BUCKET", 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sampling goes on")
        yield


@pytest.fixture
def without_capture(monkeypatch):
    """The step of a graph, called: a CPU samples as if only a device knew the position."""

    def capture(batch: Batch, pool: object) -> None:
        def step_of(reach: int) -> None:
            batch.cache.reach = reach
            batch.step(batch.new)

        first = batch.cache.length
        for place in range(first, first + batch.length - 1):
            batch.replays[batch.reach(place)] = partial(step_of, batch.reach(place))

    monkeypatch.setattr(Batch, "capture", capture)
    monkeypatch.setattr(decoding.Decoder, "can_capture", lambda self, batch: batch.length > 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_step_whose_position_is_the_devices_draws_the_same(model, condition, sampler, without_capture) -> None:
    expected, entropy = draw_batch(decoder_of(model, sampler, graphs=False), condition, range(3))
    decoder = decoder_of(model, sampler)
    for _ in range(2):  # the second batch finds the memory of the first
        tokens, spread = draw_batch(decoder, condition, range(3))
        assert torch.equal(tokens, expected) and len(decoder.batches) == 1
        torch.testing.assert_close(spread, entropy)
    (batch,) = decoder.batches.values()
    assert len(batch.replays) > 1
    short, _ = sample_tokens(model, condition, range(3), sampler, num_tokens=1)
    torch.testing.assert_close(short[:, 0], expected[:, 0])


def test_graphs_draw_the_tokens_of_the_cpu(cuda, model, condition) -> None:
    """Also where other conditions and seeds come in the same shape, and where a last batch is shorter: it is filled."""
    sampler = replace(SAMPLERS["filtered"], guidance_scale=2.0)
    decoder = decoder_of(copy.deepcopy(model).to(CUDA), sampler)
    order, pair = torch.tensor([2, 0, 1]), slice(0, 2)
    batches = [
        (condition, range(3)),
        (records.rows(condition, order), range(3, 6)),
        (records.rows(condition, pair), [7, 8]),
    ]
    captures = []
    for given, seeds in [*batches, batches[0]]:
        expected, entropy = sample_tokens(model, given, seeds, sampler)
        tokens, spread = draw_batch(decoder, to_device(given, CUDA), seeds)
        assert torch.equal(tokens.cpu(), expected)
        torch.testing.assert_close(spread.cpu(), entropy)
        captures.append(len(graphs.STATE.made))
    assert len(set(captures)) == 1 == len(decoder.batches)


def test_a_condition_is_read_in_one_pass(model, condition) -> None:
    """Under guidance that of the null rows too; and every token but the last in one of its own."""
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:2]))
    sample_tokens(model, condition, range(3), GUIDED)
    prefix = condition.tokens.shape[1] if isinstance(condition, PromptCondition) else model.prefix_length
    assert seen == [(6, prefix), *[(6, 1)] * (model.num_tokens - 1)]


def test_a_graph_reads_the_weights_of_today(cuda, tiny_generator) -> None:
    model, other = tiny_generator().to(CUDA), tiny_generator(seed=1)
    decoder, classes = decoder_of(model, GUIDED), torch.arange(3)
    draw_batch(decoder, classes.to(CUDA), range(3))
    made = len(graphs.STATE.made)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs.to(CUDA))
    tokens, _ = draw_batch(decoder, classes.to(CUDA), range(3))
    assert torch.equal(tokens.cpu(), sample_tokens(other, classes, range(3), GUIDED)[0])
    assert len(graphs.STATE.made) == made


def test_heads_that_share_keys_and_more_classes_than_few(cuda, tiny_generator) -> None:
    shared = LlamaGenGenerator(replace(LLAMAGEN, num_kv_heads=2))
    shared.reset_parameters(seeded(0, "shared"))
    torch.nn.init.normal_(shared.output.weight, generator=seeded(0, "output"))
    for model in (shared.eval(), tiny_generator(num_classes=40)):
        expected, _ = sample_tokens(model, torch.arange(3), range(3), GUIDED)
        tokens, _ = sample_tokens(copy.deepcopy(model).to(CUDA), torch.arange(3).to(CUDA), range(3), GUIDED)
        assert torch.equal(tokens.cpu(), expected) and graphs.STATE.made


MOST_OPERATIONS = {"rear": 21, "llamagen": 32, "alitok-ar": 50, "janus": 42}
"""Of one block for one token: every operation is time, in a graph as well."""
MOST_OTHERS = 52
"""Before and after the blocks: what goes in, logits, guidance, the draw, and its entropy."""


@pytest.mark.parametrize("graph", [True, False])
def test_launches_and_waits_of_a_token(cuda, model, condition, graph) -> None:
    """A token is one launch, without a graph one for each operation. None waits for the device."""
    model, condition = model.to(CUDA), to_device(condition, CUDA)
    launches, waits = [], []
    for length in (4, 9):  # with the prefix of captions no more than is looked ahead for at once
        decoder = decoder_of(model, GUIDED, num_tokens=length, graphs=graph)
        draw_batch(decoder, condition, range(3))  # captures
        cuda.clear()
        draw_batch(decoder, condition, range(3))
        launches.append(sum(cuda.launches.values()))
        waits.append(dict(cuda.waits))
    assert waits[0] == waits[1]
    most = MOST_OTHERS + MOST_OPERATIONS[model.config.kind] * model.num_layers
    if graph:
        assert cuda.launches["graph"] == 8 and launches[1] - launches[0] == 5
        assert all(made.tape.launches <= most for made in graphs.STATE.made)
    else:
        assert not graphs.STATE.made and 5 < launches[1] - launches[0] <= 5 * most


def test_what_does_not_depend_on_tokens_is_made_for_many_positions_at_once(cuda, monkeypatch) -> None:
    """In 62 tokens reAR's AdaLN is projected four times, and a graph holds none of it."""
    model = make_tiny_generator(num_tokens=62).to(CUDA)
    monkeypatch.setattr(decoding, "BUCKET", 64)
    decoder, calls = decoder_of(model, GUIDED), []
    draw_batch(decoder, torch.arange(3).to(CUDA), range(3))
    made = len(graphs.STATE.made)
    model.blocks[1].adaLN_modulation.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    draw_batch(decoder, torch.arange(3).to(CUDA), range(3))
    assert calls == [(16, 4, 6 * 32)] * 4 and made == len(graphs.STATE.made) == 1


def waiting_block(model) -> None:
    """Makes the model ask the device for a number at every token."""
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))


def unknown_place(model) -> None:
    """Makes it ask the cache how many positions were read."""

    def ask(module, inputs, output) -> None:
        assert next(value for value in inputs if isinstance(value, KVCache)).length >= 0

    model.blocks[0].register_forward_hook(ask)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(waiting_block, "not permitted when stream is capturing"), (unknown_place, "cache.length is asked for")],
)
def test_a_failed_capture_is_said_and_costs_no_token(cuda, tiny_generator, spoil, reason) -> None:
    here = tiny_generator()
    there = copy.deepcopy(here).to(CUDA)
    spoil(there)
    decoder = decoder_of(there, GUIDED)
    for count in (3, 2):  # said once, not tried again
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tokens, _ = draw_batch(decoder, torch.arange(count).to(CUDA), range(count))
        assert torch.equal(tokens.cpu(), sample_tokens(here, torch.arange(count), range(count), GUIDED)[0])
        assert len(said) == (count == 3)
        for warning in said:
            assert "sampling goes on without CUDA graphs" in str(warning.message) and reason in str(warning.message)
            assert "\n" not in str(warning.message)
    assert not decoder.batches


@pytest.mark.parametrize("later", [False, True])
def test_a_failed_capture_leaves_nothing_begun(cuda, tiny_generator, later) -> None:
    """Whether graphs of the same pool were made before it or not: memory can be given back, and others are captured."""
    here = tiny_generator()
    there = copy.deepcopy(here).to(CUDA)

    def wait(module, inputs, output):
        return output * float(output.isfinite().all()) if len(graphs.STATE.made) == later else output

    hook = there.blocks[0].register_forward_hook(wait)
    with pytest.warns(UserWarning, match="sampling goes on"):
        draw_batch(decoder_of(there, GUIDED), torch.arange(3).to(CUDA), range(3))
    assert len(graphs.STATE.made) == later and not graphs.STATE.underway
    assert graphs.STATE.uses.total() == later, "that of the graph, which gives it back itself"
    hook.remove()
    torch.cuda.empty_cache()
    decoder = decoder_of(there, GUIDED)
    tokens, _ = draw_batch(decoder, torch.arange(3).to(CUDA), range(3))
    assert torch.equal(tokens.cpu(), sample_tokens(here, torch.arange(3), range(3), GUIDED)[0])
    assert [batch for batch in decoder.batches.values() if batch.replays]


@pytest.mark.parametrize("inside", [True, False])
def test_memory_that_is_missing_for_a_capture_is_an_error_that_says_so(cuda, tiny_generator, inside) -> None:
    """Raised by the step or by what begins the capture: it is not taken for a step that cannot be captured."""
    model = tiny_generator().to(CUDA)

    def refuse(module, inputs, output) -> None:
        if (graphs.STATE.tape is not None) == inside and inputs[0].shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.62 GiB.")

    model.blocks[0].register_forward_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError, match=r"5\.62 GiB"):
        draw_batch(decoder_of(model, GUIDED), torch.arange(3).to(CUDA), range(3))


class Foreign:
    """A generator of one's own: what `types.Generator` asks, and a cache of another kind."""

    def __init__(self, inner) -> None:
        self.inner, self.vocab_size, self.num_tokens = inner, inner.vocab_size, inner.num_tokens
        self.null_condition = inner.null_condition

    def new_cache(self, batch_size: int) -> SimpleNamespace:
        return SimpleNamespace(length=0, read=torch.empty(batch_size, 0, dtype=torch.int64, device=CUDA))

    def __call__(self, context, condition, *, cache=None, tap_layers=()):
        cache.read = torch.cat([cache.read, context], 1)
        cache.length = cache.read.shape[1]
        logits, _ = self.inner(cache.read, condition, cache=self.inner.new_cache(len(condition)))
        return logits, {}


def test_a_generator_with_a_cache_of_its_own_needs_no_graph(cuda, tiny_generator) -> None:
    here = tiny_generator()
    tokens, _ = sample_tokens(Foreign(copy.deepcopy(here).to(CUDA)), torch.arange(3).to(CUDA), range(3), GUIDED)
    assert torch.equal(tokens.cpu(), sample_tokens(here, torch.arange(3), range(3), GUIDED)[0])
    assert not graphs.STATE.made


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_captured_as_well(cuda, model, condition, autocast) -> None:
    """By weights, as samples are drawn on a device, and by autocast, as a rollout is; the cache has the type."""
    there, condition = model.to(CUDA, torch.float32 if autocast else torch.bfloat16), to_device(condition, CUDA)
    drawn = []
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for graph in (True, False):
            drawn.append(draw_batch(decoder_of(there, GUIDED, graphs=graph), condition, range(3))[0])
    assert graphs.STATE.made and drawn[0].shape == (3, 16)
    assert torch.equal(*(tokens[:, 0] for tokens in drawn))  # of the prefix: the same calculation
    if not autocast:
        assert there.new_cache(1).data.dtype == torch.bfloat16


def test_a_job_captures_once_for_all_its_shards(cuda, tokenizer, tiny_generator, tmp_path) -> None:
    """Four full batches in two shards, and a shorter one in a third, which is filled up."""
    model = tiny_generator(vocab_size=tokenizer.vocab_size, num_tokens=tokenizer.num_tokens)
    job = Job(
        model.to(CUDA), tokenizer.to(CUDA), torch.arange(9) % 3, seed=0, sampler=GUIDED, source="x", precision="fp32"
    )
    run_job(job, tmp_path / "out.npz", batch_size=2, shard_size=4)
    lengths = len({min((place // 8 + 1) * 8, tokenizer.num_tokens + 2) for place in range(2, tokenizer.num_tokens + 1)})
    assert len(graphs.STATE.made) == lengths
