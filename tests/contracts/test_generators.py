"""What every registered generator keeps: causality, alignment, cache, batch, condition, taps."""

import pytest
import torch
from conftest import NUM_CLASSES

from consonar.generators import GENERATORS, Origin, load_generator, save_generator
from consonar.types import Generator

LENGTH = 16


@pytest.fixture(params=GENERATORS)
def model(request, tiny_generator):
    """One tiny model of each kind; a new kind needs its own line here."""
    return {"rear": tiny_generator}[request.param]()


@pytest.fixture
def tokens(rng):
    return torch.randint(32, (3, LENGTH), generator=rng)


CONDITION = torch.tensor([0, 2, 1])


def test_it_is_a_generator(model):
    assert isinstance(model, Generator)


@pytest.mark.parametrize("changed", [0, 7, LENGTH - 1])
def test_a_token_does_not_see_itself_or_the_future(model, tokens, changed):
    """logits[:, i] may depend on tokens < i alone: bit-equal up to the changed token, another value right after it."""
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % model.vocab_size
    before, after = model(tokens, CONDITION)[0], model(other, CONDITION)[0]
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    if changed + 1 < LENGTH:
        assert not torch.isclose(before[:, changed + 1], after[:, changed + 1]).all(-1).any()


def test_shapes_and_alignment_do_not_depend_on_the_mode(model, tokens):
    evaluated = model(tokens, CONDITION)[0]
    trained = model.train()(tokens, CONDITION)[0]
    assert evaluated.shape == (3, LENGTH, model.vocab_size)
    assert torch.equal(evaluated, trained)  # dropout is 0


def test_a_prefix_gives_the_first_logits(model, tokens):
    whole = model(tokens, CONDITION)[0]
    torch.testing.assert_close(model(tokens[:, :5], CONDITION)[0], whole[:, :5])


@pytest.mark.parametrize("pieces", [[1] * 15, [3, 1, 7, 4], [15]])
@torch.inference_mode()
def test_cached_logits_equal_uncached_ones(model, tokens, pieces):
    whole = model(tokens, CONDITION)[0]
    cache = model.new_cache(3)
    first, _ = model(tokens[:, :0], CONDITION, cache=cache)
    torch.testing.assert_close(first[:, 0], whole[:, 0])
    read = 0
    for piece in pieces:
        logits, _ = model(tokens[:, read : read + piece], CONDITION, cache=cache)
        read += piece
        assert logits.shape == (3, 1, model.vocab_size)
        torch.testing.assert_close(logits[:, 0], whole[:, read], rtol=1e-4, atol=1e-5)
    assert cache.length == model.prefix_length + 15


@torch.inference_mode()
def test_tokens_may_come_with_the_first_cached_call(model, tokens):
    logits, _ = model(tokens[:, :4], CONDITION, cache=model.new_cache(3))
    torch.testing.assert_close(logits[:, 0], model(tokens, CONDITION)[0][:, 4], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_full_cache_refuses_more(model, tokens):
    cache = model.new_cache(3)
    model(tokens, CONDITION, cache=cache)
    with pytest.raises(AssertionError, match="asked to hold"):
        model(tokens[:, :1], CONDITION, cache=cache)


def test_a_row_does_not_depend_on_its_batch(model, tokens):
    together = model(tokens, CONDITION)[0]
    alone = torch.cat([model(tokens[i : i + 1], CONDITION[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_two_calls_are_equal(model, tokens):
    assert torch.equal(model(tokens, CONDITION)[0], model(tokens, CONDITION)[0])


def test_every_condition_differs_and_the_null_one_is_its_own(model, tokens):
    row, conditions = tokens[:1].expand(4, -1), torch.arange(4)
    null = model.null_condition(CONDITION)
    assert null.shape == CONDITION.shape and torch.equal(model.null_condition(null), null)
    conditions[3] = null[0]
    logits = model(row, conditions)[0]
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(logits[i, 0], logits[j, 0]).all()


def test_taps_do_not_change_logits(model, tokens):
    plain, none = model(tokens, CONDITION)
    tapped, taps = model(tokens, CONDITION, tap_layers=(0, model.num_layers - 1))
    assert torch.equal(plain, tapped) and none == {}
    assert set(taps) == {0, model.num_layers - 1}
    assert all(tap.shape == (3, model.prefix_length + LENGTH, model.width) for tap in taps.values())


def test_taps_read_token_i_at_prefix_plus_i(model, tokens):
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % model.vocab_size
    before, after = (model(t, CONDITION, tap_layers=(0,))[1][0] for t in (tokens, other))
    place = model.prefix_length + 5
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place], after[:, place]).all(-1).any()


def test_save_and_load(model, tokens, tmp_path):
    save_generator(model, tmp_path / "model", Origin(tokenizer="tiny-vq"))
    loaded = load_generator(tmp_path / "model")
    assert torch.equal(loaded(tokens, CONDITION)[0], model(tokens, CONDITION)[0])
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_one_projection_per_class_equals_one_per_image(tiny_generator, rng) -> None:
    generator = tiny_generator(num_layers=3)
    tokens = torch.randint(32, (12, 16), generator=rng)
    classes = torch.randint(NUM_CLASSES + 1, (12,), generator=rng)
    many, _ = generator(tokens, classes)  # 12 images, 4 classes with the null class: one row per class
    few = torch.cat([generator(tokens[i : i + 3], classes[i : i + 3])[0] for i in range(0, 12, 3)])
    assert torch.allclose(many, few, atol=1e-5, rtol=1e-5)
