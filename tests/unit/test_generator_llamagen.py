"""LlamaGen's transformer beyond the contracts and the goldens: configurations, captions, positions, released files."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import stir
from manifests import manifest, names, released_shapes
from rounding import assert_rounding
from torch.nn import functional

from consonar.components import load_generator, save_generator
from consonar.config_io import from_dict, to_dict
from consonar.convert.layouts.generators import LLAMAGEN as OFFICIAL
from consonar.cpu.kernels import tune
from consonar.errors import UserError
from consonar.generators.llamagen import LLAMAGEN_PRESETS, LlamaGenConfig, LlamaGenGenerator
from consonar.origin import Origin
from consonar.sampling.sample import SamplerConfig, sample, sample_tokens
from consonar.seeding import generator as seeded
from consonar.types import Grid, TextCondition

RELEASED = names("llamagen_gpt-*")
NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
TINY = LlamaGenConfig(
    width=32, num_layers=2, num_heads=4, multiple_of=8, vocab_size=32, num_tokens=16, num_classes=3, grid=Grid(4, 4),
    **NO_DROPOUT,
)  # fmt: skip
TINY_TEXT = replace(TINY, condition="text", num_condition_tokens=4, caption_dim=6, num_classes=0)


def drawn(config: LlamaGenConfig, seed: int = 0) -> LlamaGenGenerator:
    """A model whose every weight is drawn, the output too."""
    generator, rng = tune(LlamaGenGenerator(config)), seeded(seed, "llamagen")
    generator.reset_parameters(rng)
    stir(generator, rng)
    return generator.eval()


def captions(rng: torch.Generator, dim: int = 6) -> TextCondition:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    return TextCondition(torch.randn(3, 4, dim, generator=rng), mask)


def random_tokens(rng: torch.Generator, length: int = 16) -> torch.Tensor:
    return torch.randint(32, (3, length), generator=rng)


def test_all_fourteen_released_models_are_here():
    assert len(RELEASED) == 14


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_gives_its_published_sizes(name):
    config, stated = OFFICIAL.config(released_shapes(name)), manifest(name)["config"]
    assert (config.width, config.num_layers, config.num_heads) == (stated["dim"], stated["n_layer"], stated["n_head"])
    assert config.prefix_length == stated.get("cls_token_num", 1) and config.num_kv_heads == config.ffn_width == 0


@pytest.mark.parametrize("size", LLAMAGEN_PRESETS)
def test_presets_are_the_released_sizes(size):
    shapes = released_shapes(f"llamagen_gpt-{size.lower()}_c2i_256")
    assert LLAMAGEN_PRESETS[size].sized(16384, 256, 1000, Grid(16, 16)) == OFFICIAL.config(shapes)


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, replace(TINY, num_kv_heads=2)])
def test_tiny_shapes_are_read_back_from_the_weights(config):
    """All but what shapes do not tell."""
    shapes = {key: tuple(value.shape) for key, value in LlamaGenGenerator(config).state_dict().items()}
    read = OFFICIAL.config(shapes)
    assert (read.prefix_length, read.hidden_units) == (config.prefix_length, config.hidden_units)
    for key in ("width", "num_layers", "vocab_size", "condition", "num_classes"):
        assert getattr(read, key) == getattr(config, key)
    if config.num_kv_heads == 0:
        again = LlamaGenGenerator(read).state_dict()
        assert {key: tuple(value.shape) for key, value in again.items()} == shapes


def test_a_file_saved_after_sampling_carries_a_cache_that_we_set_aside():
    state = LlamaGenGenerator(TINY).state_dict()
    left_over = {f"layers.{i}.attention.kv_cache.{x}_cache": torch.rand(2, 4, 24, 8) for i in range(2) for x in "kv"}
    ours, unused = OFFICIAL.to_ours({**state, **left_over}, TINY)
    assert ours.keys() == state.keys() and unused.keys() == left_over.keys()
    back = OFFICIAL.to_official(ours, unused, TINY)
    assert back.keys() == {**state, **left_over}.keys()
    assert all(torch.equal(back[key], value) for key, value in {**state, **left_over}.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, r"model\.num_heads: 3 does not cut model\.width 32"),
        ({"num_heads": 16}, r"model\.num_heads: 16 does not cut .* a multiple of 4"),
        ({"num_layers": 0}, r"model\.num_layers: 0 is not in \[1, 1000\]"),
        ({"rope_base": -1.0}, r"model\.rope_base: -1\.0 is not in \[1e-06, 1e\+12\]"),
        ({"ffn_dropout": 1.0}, r"model\.ffn_dropout: 1\.0 is not in \[0, 1\)"),
        ({"vocab_size": -1}, r"model\.vocab_size: -1 is negative"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads: 3 does not divide model\.num_heads 4"),
        ({"num_tokens": 15}, r"model\.num_tokens: 15, but model\.grid has 16 places"),
        ({"num_condition_tokens": 2}, r"model\.num_condition_tokens: 2, but a class has 1"),
        ({"condition": "text"}, r"model\.num_classes: 3, but model\.condition is text"),
        ({"condition": "text", "num_classes": 0, "caption_dim": 0}, r"model\.caption_dim: 0 is not positive"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_a_shape_is_sized_by_the_data():
    bare = LlamaGenConfig(width=32, num_heads=4)
    sized = bare.sized(64, 30, 5, Grid(5, 6))
    assert (sized.vocab_size, sized.num_tokens, sized.num_classes, sized.grid) == (64, 30, 5, Grid(5, 6))
    assert sized.sized(64, 30, 5, Grid(5, 6)) == sized
    text = replace(bare, condition="text").sized(64, 30, 5, Grid(5, 6))
    assert text.num_classes == 0 and text.prefix_length == 120
    with pytest.raises(UserError, match=r"model\.vocab_size: 64, but the token store has 63"):
        sized.sized(63, 30, 5, Grid(5, 6))
    with pytest.raises(UserError, match=r"model\.grid: .*rows=5.*, but the token store has .*rows=6"):
        sized.sized(64, 30, 5, Grid(6, 5))
    with pytest.raises(UserError, match=r"model\.num_tokens: 31, but model\.grid has 30"):
        bare.sized(64, 31, 5, Grid(5, 6))
    with pytest.raises(UserError, match=r"model\.vocab_size: 0 is not positive"):
        LlamaGenGenerator(bare)


def test_a_shape_survives_its_file(tmp_path):
    """The grid too, which is a table in a table."""
    for config in (TINY_TEXT, replace(TINY, grid=None)):
        assert from_dict(json.loads(json.dumps(to_dict(config))), "x", LlamaGenConfig) == config
        save_generator(LlamaGenGenerator(config), tmp_path / "model", Origin(tokenizer="tiny-vq"))
        assert load_generator(tmp_path / "model").config == config


def test_weights_of_one_resolution_load_at_another(rng):
    """As the released models at 256, 384 and 512 pixels: tables of positions are no weights."""
    small, large = drawn(TINY), drawn(replace(TINY, grid=Grid(6, 6), num_tokens=36), seed=1)
    large.load_state_dict(small.state_dict())
    labels, tokens = torch.tensor([0, 1, 2]), random_tokens(rng, 36)
    assert large(tokens, labels)[0].shape == (3, 36, 32)
    # The first row of places is the same in both grids, the second is not.
    upper, lower = small(tokens[:, :16], labels)[0], large(tokens[:, :16], labels)[0]
    assert_rounding(upper[:, :4], lower[:, :4], 1000)
    assert not torch.isclose(upper[:, 5], lower[:, 5]).all()


def test_positions_follow_the_grid(rng):
    """A grid, a grid with a prefix and a line give other logits with the same weights."""
    labels, tokens = torch.tensor([0, 1, 2]), random_tokens(rng)
    logits = []
    for grid in (Grid(4, 4), Grid(2, 8), Grid(3, 4, prefix=4), None):
        model = LlamaGenGenerator(replace(TINY, grid=grid)).eval()
        model.load_state_dict(drawn(TINY).state_dict())
        logits.append(model(tokens, labels)[0])
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(logits[i][:, -1], logits[j][:, -1]).all()


def test_the_content_of_padding_is_not_read_but_the_mask_is(rng):
    model, tokens, condition = drawn(TINY_TEXT), random_tokens(rng), captions(rng)
    logits, taps = model(tokens, condition, tap_layers=(1,))
    noise = torch.randn(condition.features.shape, generator=rng)
    other = replace(condition, features=torch.where(condition.mask[:, :, None], condition.features, noise))
    changed, changed_taps = model(tokens, other, tap_layers=(1,))
    assert torch.equal(logits, changed) and torch.equal(taps[1], changed_taps[1])
    unmasked = model(tokens, replace(condition, mask=torch.ones_like(condition.mask)))[0]
    full = condition.mask.all(1)
    assert torch.isclose(unmasked, logits, atol=1e-5).all(2).all(1).tolist() == full.tolist() == [False, True, False]


def test_an_empty_caption_gives_finite_logits(rng):
    condition = captions(rng)
    empty = replace(condition, mask=torch.zeros_like(condition.mask))
    assert drawn(TINY_TEXT)(random_tokens(rng), empty)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 4, 7)])
def test_captions_of_another_length_or_width_are_refused(shape, rng):
    condition = TextCondition(torch.zeros(shape), torch.ones(shape[:2]).bool())
    with pytest.raises(UserError, match=r"condition\.features: .* per caption, the generator takes \(4, 6\)"):
        drawn(TINY_TEXT)(random_tokens(rng), condition)


def test_the_null_caption_is_kept_but_not_trained(rng):
    model = LlamaGenGenerator(TINY_TEXT)
    key = "cls_embedding.uncond_embedding"
    assert key in model.state_dict() and key not in dict(model.named_parameters())
    condition = replace(captions(rng), features=torch.zeros(3, 4, 6, dtype=torch.bfloat16))
    null = model.null_condition(condition)
    assert torch.equal(null.mask, condition.mask) and null.features.dtype == torch.bfloat16
    assert torch.equal(null.features[1], model.state_dict()[key].bfloat16())


@pytest.mark.parametrize("config", [TINY, TINY_TEXT])
def test_weights_are_drawn_from_the_given_generator_alone(config):
    model = LlamaGenGenerator(config)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        model.reset_parameters(seeded(seed, "init"))
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    constant = {key for key in states[0] if key.endswith("norm.weight") or key == "output.weight"}
    same = {key for key in states[0] if torch.equal(states[0][key], states[2][key])}
    assert same == constant


def test_dropout_acts_in_training_alone(rng):
    labels, tokens = torch.tensor([0, 1, 2]), random_tokens(rng)
    plain = drawn(TINY)(tokens, labels)[0]
    for key in ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout"):
        model = drawn(replace(TINY, **{key: 0.5}))
        assert torch.equal(model(tokens, labels)[0], plain)
        assert not torch.isclose(model.train()(tokens, labels)[0], plain).all(), key


def test_a_model_built_without_memory_runs_once_weights_are_assigned(rng):
    labels, tokens = torch.tensor([0, 1, 2]), random_tokens(rng)
    with torch.device("meta"):
        model = LlamaGenGenerator(TINY)
    model.load_state_dict(drawn(TINY).state_dict(), assign=True)
    assert_rounding(model.eval()(tokens, labels)[0], drawn(TINY)(tokens, labels)[0], 1000)


@pytest.mark.parametrize("positions_outside_heads", [False, True])
@torch.inference_mode()
def test_grouped_heads_read_one_cache(positions_outside_heads, rng, monkeypatch):
    if positions_outside_heads:  # in memory, as CUDA's kernels give them
        kernel = functional.scaled_dot_product_attention
        swapped = lambda *given, **named: kernel(*given, **named).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
        monkeypatch.setattr(functional, "scaled_dot_product_attention", swapped)
    model, labels, tokens = drawn(replace(TINY, num_kv_heads=2)), torch.tensor([0, 1, 2]), random_tokens(rng)
    whole, cache = model(tokens, labels)[0], model.new_cache(3)
    assert cache.data.shape == (2, 2, 3, 2, 17, 8)
    for i in range(16):
        logits, _ = model(tokens[:, max(0, i - 1) : i], labels, cache=cache)
        assert_rounding(logits[:, 0], whole[:, i], 1000)


@pytest.mark.parametrize("config", [TINY, TINY_TEXT])
@torch.inference_mode()
def test_half_precision_follows_full_precision(config, rng):
    model, tokens = drawn(config), random_tokens(rng)
    condition = captions(rng) if config.condition == "text" else torch.tensor([0, 1, 2])
    full = model(tokens, condition)[0]
    model.bfloat16()
    cache = model.new_cache(3)
    assert cache.data.dtype == torch.bfloat16
    half = torch.cat([model(tokens[:, max(0, i - 1) : i], condition, cache=cache)[0] for i in range(16)], 1)
    assert half.dtype == torch.float32  # logits, of weights in bf16
    assert (half - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, replace(TINY, attention_dropout=0.1)])
def test_every_weight_gets_a_gradient_under_mixed_precision(config, rng):
    """But rows of embeddings that were not read."""
    model, tokens = drawn(config).train(), random_tokens(rng)
    condition = captions(rng) if config.condition == "text" else torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, condition)[0].float().log_softmax(-1).gather(-1, tokens[..., None]).mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


def test_captions_are_sampled_to_images_whatever_the_batch(tokenizer, rng):
    generator, condition = drawn(TINY_TEXT), captions(rng)
    config = SamplerConfig(guidance_scale=3, guidance_schedule="interval", guidance_interval=5, top_k=20)
    together = sample(generator, tokenizer, condition, seeds=[7, 8, 9], config=config)
    apart = sample(generator, tokenizer, condition, seeds=[7, 8, 9], config=config, batch_size=2)
    assert together.images.shape == (3, 3, 16, 16) and torch.equal(together.tokens, apart.tokens)
    unmasked = replace(condition, mask=torch.ones_like(condition.mask))
    other, _ = sample_tokens(generator, unmasked, [7, 8, 9], config)
    assert torch.equal(other[1], together.tokens[1]) and not torch.equal(other[0], together.tokens[0])


def test_conditions_of_the_wrong_kind_are_refused(tokenizer, rng):
    with pytest.raises(UserError, match=r"condition: a TextCondition, but this generator takes class ids 0\.\.2"):
        sample(drawn(TINY), tokenizer, captions(rng))
    with pytest.raises(UserError, match=r"classes: this generator has none, it takes captions"):
        sample(drawn(TINY_TEXT), tokenizer, [0, 1])
