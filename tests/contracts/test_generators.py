"""What every registered generator keeps: causality, alignment, cache, batch, condition, taps."""

from dataclasses import replace

import pytest
import torch
from conftest import NUM_CLASSES, make_tiny_generator, stir
from rounding import assert_rounding

from consonar import records
from consonar.components import load_generator, save_generator
from consonar.cpu.kernels import tune
from consonar.distributed import ALONE
from consonar.generators import GENERATORS
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.checked import check_generator
from consonar.generators.janus import JanusConfig, pad_prompts
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.origin import Origin
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.training.objectives.base import drop_classes
from consonar.types import Condition, Generator, Grid, TextCondition

LENGTH = 16
SUMMANDS = 1000  # on the way to a logit: two or three layers of width 32, MLPs of up to 128
ROTARY = {
    "width": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 8, "token_dropout": 0.0, "attention_dropout": 0.0,
    "residual_dropout": 0.0, "ffn_dropout": 0.0, "vocab_size": 32, "num_tokens": LENGTH,
}  # fmt: skip
LLAMAGEN = LlamaGenConfig(**ROTARY, num_classes=NUM_CLASSES, grid=Grid(4, 4))
REAR = ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.0, vocab_size=32, num_tokens=LENGTH)
# One tiny model of each kind that `tiny_generator` does not make; a new kind needs its own line here.
CONFIGS = {
    "llamagen": LLAMAGEN,
    "llamagen, text": replace(LLAMAGEN, condition="text", num_condition_tokens=4, caption_dim=6, num_classes=0),
    "rear, text": replace(REAR, condition="text", num_condition_tokens=4, caption_dim=6),
    "rear, tied": replace(REAR, num_classes=NUM_CLASSES, tied_code_dim=5),
    "rear, pooled text": replace(REAR, condition="text", num_condition_tokens=4, caption_dim=6, pooled=True),
    "alitok-ar": AliTokARConfig(**ROTARY, num_classes=NUM_CLASSES, grid=Grid(3, 4, prefix=4)),
    "janus": JanusConfig(
        width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, text_vocab_size=20, pad_token=1,
        max_prompt_tokens=9, code_dim=4, head_width=24, vocab_size=32, num_tokens=LENGTH,
    ),
}  # fmt: skip
KINDS = ("rear", *CONFIGS)


def make_generator(name: str) -> Generator:
    """The tiny model of a name in `KINDS`; every weight is drawn, so that no path is switched off by a zero."""
    if name == "rear":
        return make_tiny_generator()
    config = CONFIGS[name]
    generator, rng = tune(GENERATORS[config.kind].model(config)), seeded(0, name)
    generator.reset_parameters(rng)
    stir(generator, rng)
    if name == "rear, tied":
        generator.embeddings.tie(torch.randn(32, 5, generator=rng))
    return generator.eval()


def make_condition(model: Generator, rng: torch.Generator) -> Condition:
    """Three, all different."""
    if model.num_classes:
        return torch.tensor([0, 2, 1])
    if model.config.kind == "janus":
        return pad_prompts([[2, 5, 6, 3], [2, 7, 8, 9, 5, 3], [2, 6, 3]], model.config.pad_token)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    return TextCondition(torch.randn(3, 4, 6, generator=rng), mask)


@pytest.fixture(params=KINDS)
def model(request):
    return make_generator(request.param)


@pytest.fixture
def condition(model, rng):
    return make_condition(model, rng)


@pytest.fixture
def tokens(rng):
    return torch.randint(32, (3, LENGTH), generator=rng)


def test_every_kind_has_a_tiny_model():
    assert {"rear", *(config.kind for config in CONFIGS.values())} == set(GENERATORS)


def test_it_is_a_generator(model: Generator):
    check_generator(model, "what is asked of those of other packages")


@pytest.mark.parametrize("changed", [0, 7, LENGTH - 1])
def test_a_token_does_not_see_itself_or_the_future(model, condition, tokens, changed):
    """logits[:, i] may depend on tokens < i alone: bit-equal up to the changed token, another value right after it."""
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % model.vocab_size
    before, after = model(tokens, condition)[0], model(other, condition)[0]
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    if changed + 1 < LENGTH:
        assert not torch.isclose(before[:, changed + 1], after[:, changed + 1]).all(-1).any()


def test_shapes_and_alignment_do_not_depend_on_the_mode(model, condition, tokens):
    evaluated = model(tokens, condition)[0]
    trained = model.train()(tokens, condition)[0]
    assert evaluated.shape == (3, LENGTH, model.vocab_size)
    assert torch.equal(evaluated, trained)  # dropout is 0


def test_a_prefix_gives_the_first_logits(model, condition, tokens):
    whole = model(tokens, condition)[0]
    assert_rounding(model(tokens[:, :5], condition)[0], whole[:, :5], SUMMANDS)


@pytest.mark.parametrize("pieces", [[1] * 15, [3, 1, 7, 4], [15]])
@torch.inference_mode()
def test_cached_logits_equal_uncached_ones(model, condition, tokens, pieces):
    whole = model(tokens, condition)[0]
    cache = model.new_cache(3)
    first, _ = model(tokens[:, :0], condition, cache=cache)
    assert_rounding(first[:, 0], whole[:, 0], SUMMANDS)
    read = 0
    for piece in pieces:
        logits, _ = model(tokens[:, read : read + piece], condition, cache=cache)
        read += piece
        assert logits.shape == (3, 1, model.vocab_size)
        assert_rounding(logits[:, 0], whole[:, read], SUMMANDS)
    assert cache.length == model.prefix_length + 15


@torch.inference_mode()
def test_tokens_may_come_with_the_first_cached_call(model, condition, tokens):
    logits, _ = model(tokens[:, :4], condition, cache=model.new_cache(3))
    assert_rounding(logits[:, 0], model(tokens, condition)[0][:, 4], SUMMANDS)


@torch.inference_mode()
def test_a_full_cache_refuses_more(model, condition, tokens):
    cache = model.new_cache(3)
    model(tokens, condition, cache=cache)
    with pytest.raises(AssertionError, match="asked to hold"):
        model(tokens[:, :1], condition, cache=cache)


def test_a_row_does_not_depend_on_its_batch(model, condition, tokens):
    together = model(tokens, condition)[0]
    alone = torch.cat([model(tokens[i : i + 1], records.rows(condition, slice(i, i + 1)))[0] for i in range(3)])
    assert_rounding(together, alone, SUMMANDS)


def test_two_calls_are_equal(model, condition, tokens):
    assert torch.equal(model(tokens, condition)[0], model(tokens, condition)[0])


def fields(condition) -> list[torch.Tensor]:
    return [condition] if isinstance(condition, torch.Tensor) else list(vars(condition).values())


def test_every_condition_differs_and_the_null_one_is_its_own(model, condition, tokens):
    null = model.null_condition(condition)
    for given, ours, again in zip(*map(fields, (condition, null, model.null_condition(null))), strict=True):
        assert ours.shape == given.shape and ours.dtype == given.dtype and torch.equal(again, ours)
    all_four = records.concatenate(condition, records.rows(null, slice(0, 1)))
    logits = model(tokens[:1].expand(4, -1), all_four)[0]
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(logits[i, 0], logits[j, 0]).all()


@torch.inference_mode()
def test_a_condition_never_reaches_another_row(model, condition, tokens):
    """Bit for bit: of three conditions the last becomes the null one, and the logits of the others stay."""
    last = torch.tensor([False, False, True])
    other = records.select(~last, condition, model.null_condition(condition))
    before, after = model(tokens, condition)[0], model(tokens, other)[0]
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])


@torch.inference_mode()
def test_no_guidance_reads_no_null_condition(model, condition, monkeypatch):
    plain, _ = sample_tokens(model, condition, range(3), SamplerConfig(guidance_scale=1.0))
    monkeypatch.setattr(model, "null_condition", None)
    assert torch.equal(sample_tokens(model, condition, range(3), SamplerConfig(guidance_scale=1.0))[0], plain)


@torch.inference_mode()
def test_a_dropped_condition_is_the_null_one_whatever_it_was(model, condition, tokens):
    dropped = drop_classes(model, condition, 1.0, 0, 0, ALONE)
    assert all(
        torch.equal(*pair) for pair in zip(*map(fields, (dropped, model.null_condition(condition))), strict=True)
    )
    if isinstance(condition, torch.Tensor):
        other = condition.flip(0)
    elif isinstance(condition, TextCondition):
        other = replace(condition, features=condition.features + 1)
    else:
        other = pad_prompts([[2, 8, 9, 3], [2, 6, 6, 6, 6, 3], [2, 9, 3]], model.config.pad_token)
    null = model(tokens, drop_classes(model, other, 1.0, 0, 0, ALONE))[0]
    assert torch.equal(model(tokens, dropped)[0], null)
    assert not torch.isclose(model(tokens, other)[0], null).all()


@torch.inference_mode()
def test_guided_samples_are_the_most_likely_tokens_of_the_guided_logits(model, condition):
    config = SamplerConfig(temperature=0, guidance_scale=2.5)
    tokens, _ = sample_tokens(model, condition, range(3), config)
    conditional, unconditional = model(tokens, condition)[0], model(tokens, model.null_condition(condition))[0]
    guided = unconditional + 2.5 * (conditional - unconditional)
    best, second = guided.topk(2).values.unbind(-1)
    clear = best - second > 1e-3
    assert clear.float().mean() > 0.9 and len(tokens.unique()) > 4
    assert torch.equal(guided.argmax(-1)[clear], tokens[clear])


def test_bf16_weights_sample(model, condition, tokens):
    """With a cache that has them too, and logits that are off by their rounding."""
    exact, _ = model(tokens, condition)
    model.bfloat16()
    assert model.new_cache(2).data.dtype == torch.bfloat16
    with torch.no_grad():
        logits, _ = model(tokens, condition)
    assert logits.dtype == torch.float32 and (logits - exact).norm() < 0.05 * exact.norm()
    rounded = logits.bfloat16().float()
    assert not torch.equal(rounded, logits)  # they never had so few bits
    assert model(tokens, condition)[0].dtype == torch.bfloat16  # in training, what autograd knows of
    drawn, entropy = sample_tokens(model, condition, range(3), SamplerConfig(guidance_scale=2.0))
    assert drawn.shape == tokens.shape and entropy.dtype == torch.float32 and entropy.min() > 0


def test_taps_do_not_change_logits(model, condition, tokens):
    plain, none = model(tokens, condition)
    tapped, taps = model(tokens, condition, tap_layers=(0, model.num_layers - 1))
    assert torch.equal(plain, tapped) and none == {}
    assert set(taps) == {0, model.num_layers - 1}
    assert all(tap.shape == (3, model.prefix_length + LENGTH, model.width) for tap in taps.values())


def test_taps_read_token_i_at_prefix_plus_i(model, condition, tokens):
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % model.vocab_size
    before, after = (model(t, condition, tap_layers=(0,))[1][0] for t in (tokens, other))
    place = model.prefix_length + 5
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place], after[:, place]).all(-1).any()


def test_save_and_load(model, condition, tokens, tmp_path):
    save_generator(model, tmp_path / "model", Origin(tokenizer="tiny-vq"))
    loaded = load_generator(tmp_path / "model")
    stored, read = model.state_dict(), loaded.state_dict()
    assert stored.keys() == read.keys() and all(torch.equal(stored[key], read[key]) for key in stored)
    # Weights read from a file may lie elsewhere in memory, which kernels can take note of.
    assert_rounding(loaded(tokens, condition)[0], model(tokens, condition)[0], SUMMANDS)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_one_projection_per_class_equals_one_per_image(tiny_generator, rng) -> None:
    generator = tiny_generator(num_layers=3)
    tokens = torch.randint(32, (12, 16), generator=rng)
    classes = torch.randint(NUM_CLASSES + 1, (12,), generator=rng)
    many, _ = generator(tokens, classes)  # 12 images, 4 classes with the null class: one row per class
    few = torch.cat([generator(tokens[i : i + 3], classes[i : i + 3])[0] for i in range(0, 12, 3)])
    assert_rounding(many, few, SUMMANDS)
