"""AliTok's generator beyond the contracts and the goldens."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import stir
from manifests import manifest, released_shapes
from rounding import assert_rounding

from consonar.config_io import from_dict, to_dict
from consonar.convert.layouts.generators import ALITOK as OFFICIAL
from consonar.cpu.kernels import tune
from consonar.errors import UserError
from consonar.generators.alitok import ALITOK_PRESETS, AliTokARConfig, AliTokARGenerator
from consonar.seeding import generator as seeded
from consonar.types import Grid

TINY = AliTokARConfig(
    width=32, num_layers=2, num_heads=4, multiple_of=8, token_dropout=0.0, attention_dropout=0.0,
    residual_dropout=0.0, ffn_dropout=0.0, vocab_size=32, num_tokens=16, num_classes=3, grid=Grid(3, 4, prefix=4),
)  # fmt: skip


def drawn(config: AliTokARConfig) -> AliTokARGenerator:
    """A model whose every weight is drawn, the output too."""
    generator, rng = tune(AliTokARGenerator(config)), seeded(0, "alitok")
    generator.reset_parameters(rng)
    stir(generator, rng)
    return generator.eval()


@pytest.mark.parametrize("size", ALITOK_PRESETS)
def test_presets_are_the_released_sizes(size):
    name = f"alitok_ar_{size.lower()}"
    config = OFFICIAL.config(released_shapes(name))
    assert config == ALITOK_PRESETS[size].sized(4096, 273, 1000, Grid(16, 16, prefix=17))
    assert config.num_heads == manifest(name)["config"]["generator"]["num_attention_heads"]


def test_tiny_shapes_are_read_back_from_the_weights():
    state = AliTokARGenerator(TINY).state_dict()
    read = OFFICIAL.config({key: tuple(value.shape) for key, value in state.items()})
    assert (read.width, read.num_layers, read.num_heads, read.hidden_units) == (32, 2, 4, TINY.hidden_units)
    assert (read.vocab_size, read.num_classes) == (32, 3)
    back = OFFICIAL.to_official(*OFFICIAL.to_ours(state, read), read)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"model\.num_tokens: 273, but model\.grid has 256 places"):
        ALITOK_PRESETS["B"].sized(4096, 273, 1000, Grid(16, 16))
    with pytest.raises(UserError, match=r"model\.num_heads: 5 does not cut"):
        replace(TINY, num_heads=5)
    with pytest.raises(UserError, match=r"model\.num_classes: 0 is not positive"):
        AliTokARGenerator(replace(TINY, num_classes=0))


def test_a_shape_survives_its_file():
    assert from_dict(json.loads(json.dumps(to_dict(TINY))), "x", AliTokARConfig) == TINY


def test_classes_stand_behind_codes_and_mask(rng):
    """Changing one row of the table changes what reads it and nothing else."""
    model, tokens = drawn(TINY), torch.randint(32, (4, 16), generator=rng)
    labels = torch.arange(4)  # 3 is the null class
    assert torch.equal(model.null_condition(labels[:3]), torch.full((3,), 3)) and model.mask_token == 32
    before = model(tokens, labels)[0]
    with torch.no_grad():
        model.embeddings.weight[32 + 1 + 2] += 1
    changed = ~torch.isclose(model(tokens, labels)[0], before).all(-1).all(-1)
    assert changed.tolist() == [False, False, True, False]


def test_prefix_tokens_sit_on_a_line_and_the_others_on_a_grid(rng):
    """With the same weights, another shape of the grid leaves the prefix as it is."""
    labels, tokens = torch.tensor([0, 1, 2]), torch.randint(32, (3, 16), generator=rng)
    wide, tall = (drawn(replace(TINY, grid=grid)) for grid in (Grid(3, 4, prefix=4), Grid(6, 2, prefix=4)))
    ours, theirs = wide(tokens, labels)[0], tall(tokens, labels)[0]
    assert_rounding(ours[:, :7], theirs[:, :7], 1000)  # token 6 is the first of another row
    assert not torch.isclose(ours[:, 7], theirs[:, 7]).all()


@torch.inference_mode()
def test_half_precision_follows_full_precision(rng):
    model, labels, tokens = drawn(TINY), torch.tensor([0, 1, 2]), torch.randint(32, (3, 16), generator=rng)
    full = model(tokens, labels)[0]
    model.bfloat16()
    cache = model.new_cache(3)
    half = torch.cat([model(tokens[:, max(0, i - 1) : i], labels, cache=cache)[0] for i in range(16)], 1)
    assert half.dtype == torch.float32 and (half - full).norm() / full.norm() < 0.03


def test_every_weight_gets_a_gradient_under_mixed_precision(rng):
    model, labels, tokens = drawn(TINY).train(), torch.tensor([0, 1, 2]), torch.randint(32, (3, 16), generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels)[0].float().log_softmax(-1).gather(-1, tokens[..., None]).mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


def test_dropout_acts_in_training_alone(rng):
    labels, tokens = torch.tensor([0, 1, 2]), torch.randint(32, (3, 16), generator=rng)
    plain = drawn(TINY)(tokens, labels)[0]
    for key in ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout"):
        model = drawn(replace(TINY, **{key: 0.5}))
        assert torch.equal(model(tokens, labels)[0], plain)
        assert not torch.isclose(model.train()(tokens, labels)[0], plain).all(), key
