"""Janus: the same network as transformers' whole model, prompts of several lengths, released files in both layouts."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY_VQ
from rounding import assert_rounding
from tiny_janus import AUTHORS, AUTHORS_VQ, TRANSFORMERS, TRANSFORMERS_VQ, authors_file, drawn, whole_janus

from consonar.convert.layouts import janus as files
from consonar.errors import UserError
from consonar.generators.janus import JANUS_PRESETS, JanusConfig, JanusGenerator, pad_prompts
from consonar.sampling.checks import check_condition
from consonar.sampling.sample import SamplerConfig, sample, sample_tokens
from consonar.seeding import generator as seeded
from consonar.tokenizers.vq import VQTokenizer
from consonar.types import PromptCondition

BOS, PAD, IMAGE_START = 2, 1, 3
TINY = JanusConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, text_vocab_size=20, pad_token=PAD,
    max_prompt_tokens=9, code_dim=4, head_width=24, vocab_size=32, num_tokens=16,
)  # fmt: skip
PROMPTS = [[BOS, 5, 6, IMAGE_START], [BOS, 7, 8, 9, 5, IMAGE_START], [BOS, 6, IMAGE_START]]


@pytest.fixture
def model():
    return drawn(JanusGenerator(TINY))


@pytest.fixture
def tokens(rng):
    return torch.randint(32, (3, 16), generator=rng)


@pytest.fixture(scope="module")
def whole():
    return whole_janus(pad=PAD, begin=BOS)


def converted(whole):
    """Our generator with the weights of transformers' model, through the record of its files."""
    state = files.split_parts(whole.state_dict())["generator"]
    config = TRANSFORMERS.config({key: tuple(value.shape) for key, value in state.items()})
    config = replace(config, pad_token=PAD, num_tokens=16, max_prompt_tokens=9)
    generator = JanusGenerator(config).eval()
    generator.load_state_dict(TRANSFORMERS.to_ours(state, config)[0])
    return generator


@torch.inference_mode()
def test_logits_are_those_of_transformers_one_place_before_each_token(whole, rng):
    """Also: the slots of VA-pi's trainer, one later, are others."""
    generator, prompt = converted(whole), PROMPTS[1]
    tokens = torch.randint(40, (1, 16), generator=rng)
    text = whole.get_input_embeddings()(torch.tensor([prompt]))
    image = whole.prepare_embeddings_for_image_generation(tokens)
    hidden = whole.model.language_model(inputs_embeds=torch.cat([text, image], 1)).last_hidden_state
    released = whole.model.generation_head(hidden)
    ours, _ = generator(tokens, pad_prompts([prompt]))
    last = len(prompt) - 1
    torch.testing.assert_close(ours, released[:, last : last + 16], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(ours, released[:, last + 1 : last + 17], rtol=1e-2, atol=1e-2).all(-1).any()


def test_row_0_reads_the_start_of_image_token_and_row_1_token_0(model, tokens):
    condition = pad_prompts(PROMPTS, PAD)
    other = PromptCondition(condition.tokens.clone(), condition.mask)
    other.tokens[:, -1] = 11
    first, changed = model(tokens, condition)[0], model(tokens, other)[0]
    assert not torch.isclose(first[:, 0], changed[:, 0]).all(-1).any()
    others = tokens.clone()
    others[:, 0] = (others[:, 0] + 1) % 32
    changed = model(others, condition)[0]
    assert torch.equal(first[:, 0], changed[:, 0])  # a row 0 that had read token 0 would differ
    assert not torch.isclose(first[:, 1], changed[:, 1]).all(-1).any()


def test_greedy_images_are_those_of_transformers(whole):
    """With guidance 5, a null prompt and prompts of two lengths.

    The image sampler of transformers 5.0 itself gives other tokens after the first; later ones were put right.
    """
    generator, condition = converted(whole), pad_prompts(PROMPTS[:2], PAD)
    settings = transformers.GenerationConfig(
        do_sample=False, guidance_scale=5.0, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=4, max_length=30,
        num_return_sequences=1, generation_kwargs={"boi_token_id": IMAGE_START},
    )  # fmt: skip
    found = set()
    for row in range(2):
        one = PromptCondition(condition.tokens[row : row + 1], condition.mask[row : row + 1])
        kept = one.tokens[one.mask][None]
        theirs = whole.generate(
            kept, torch.ones_like(kept), generation_mode="image", generation_config=settings
        )  # fmt: skip
        ours, _ = sample_tokens(generator, one, [0], SamplerConfig(temperature=0, guidance_scale=5.0))
        assert torch.equal(ours, theirs)
        found |= set(ours.flatten().tolist())
    assert len(found) > 4  # else the comparison would say little
    together, _ = sample_tokens(generator, condition, [0, 1], SamplerConfig(temperature=0, guidance_scale=5.0))
    assert torch.equal(together[1:], ours)


def test_a_padded_row_equals_the_row_alone_and_padding_is_not_seen(model, tokens):
    condition = pad_prompts(PROMPTS, PAD)
    together = model(tokens, condition)[0]
    for row, prompt in enumerate(PROMPTS):
        alone = model(tokens[row : row + 1], pad_prompts([prompt], PAD))[0]
        assert_rounding(together[row : row + 1], alone, 1000)
    other = PromptCondition(condition.tokens.masked_fill(~condition.mask, 13), condition.mask)
    assert torch.equal(model(tokens, other)[0], together)


def test_the_null_prompt_keeps_its_first_and_last_token(model, tokens):
    condition = pad_prompts(PROMPTS, PAD)
    null = model.null_condition(condition)
    assert torch.equal(null.mask, condition.mask)
    kept = [null.tokens[row][null.mask[row]].tolist() for row in range(3)]
    assert kept == [[BOS, PAD, PAD, IMAGE_START], [BOS, PAD, PAD, PAD, PAD, IMAGE_START], [BOS, PAD, IMAGE_START]]
    assert condition.tokens[1].tolist() == PROMPTS[1]  # the input is untouched
    longer = model.null_condition(pad_prompts([[BOS, 5, 6, 7, IMAGE_START]], PAD))
    first = model(tokens[:1], model.null_condition(pad_prompts([PROMPTS[0]], PAD)))[0]
    assert not torch.isclose(model(tokens[:1], longer)[0], first).all()  # its padding is attended to


def test_cached_taps_are_the_uncached_ones(model, tokens):
    condition, layers = pad_prompts(PROMPTS, PAD), (0, 1)
    _, whole = model(tokens, condition, tap_layers=layers)
    with torch.inference_mode():
        cache = model.new_cache(3)
        _, first = model(tokens[:, :5], condition, cache=cache, tap_layers=layers)
        _, second = model(tokens[:, 5:], condition, cache=cache, tap_layers=layers)
    assert cache.length == cache.data.shape[4]
    for layer in layers:
        assert not whole[layer][:, :3].any()  # the positions that the longest prompt of the batch leaves unused
        assert_rounding(torch.cat([first[layer], second[layer]], 1), whole[layer], 1000)


def test_images_come_out_of_prompts(tokenizer):
    generator = drawn(JanusGenerator(replace(TINY, num_tokens=0, vocab_size=0).sized(32, 16, 3)))
    samples = sample(generator, tokenizer, pad_prompts(PROMPTS, PAD), seeds=[4, 5, 6], batch_size=2)
    assert samples.images.shape == (3, 3, TINY_VQ.image_size, TINY_VQ.image_size)
    again = sample(generator, tokenizer, pad_prompts(PROMPTS[2:], PAD), seeds=[6])
    assert torch.equal(samples.tokens[2:], again.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_bfloat16_weights_stay_near_float32(model, tokens, dtype):
    condition = pad_prompts(PROMPTS, PAD)
    exact = model(tokens, condition)[0].detach()
    near = drawn(JanusGenerator(TINY)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), torch.inference_mode():
        whole = near(tokens, condition)[0]
        cache = near.new_cache(3)
        near(tokens[:, :7], condition, cache=cache)
        cached, _ = near(tokens[:, 7:8], condition, cache=cache)
    assert whole.dtype == (torch.bfloat16 if dtype == torch.float32 else torch.float32)
    scale = exact.abs().max()
    assert 0 < (whole - exact).abs().max() < 0.05 * scale
    assert (cached[:, 0] - exact[:, 8]).abs().max() < 0.05 * scale


def test_every_weight_is_drawn_from_the_given_generator():
    def state(seed):
        generator = JanusGenerator(TINY)
        generator.reset_parameters(seeded(seed, "init"))
        return generator.state_dict()

    first, again, other = state(0), state(0), state(1)
    for key, value in first.items():
        assert torch.equal(value, again[key])
        matrix = value.ndim > 1
        assert torch.equal(value, other[key]) != matrix, key
        assert value.dtype == torch.float32


def test_weights_assigned_on_the_meta_device_make_a_whole_generator(model, tokens):
    """Nothing is left on the meta device, and nothing was drawn to build it."""
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        empty = JanusGenerator(TINY)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not list(empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    condition = pad_prompts(PROMPTS, PAD)
    assert torch.equal(empty.to("cpu")(tokens, condition)[0], model(tokens, condition)[0])


def test_every_parameter_has_a_gradient(model, tokens):
    condition = pad_prompts(PROMPTS, PAD)
    null = model.null_condition(condition)
    logits = model.train()(tokens, null)[0]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert model.language_model.embed_tokens.weight.grad[PAD].any()  # the null prompt learns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "model.num_heads: 3"),
        ({"width": 4}, "model.num_heads: 4"),
        ({"num_kv_heads": 3}, "model.num_kv_heads: 3"),
        ({"num_layers": 0}, "model.num_layers: 0"),
        ({"head_width": -1}, "model.head_width: -1"),
        ({"pad_token": 20}, r"model.pad_token: 20 is not a text token; choices: 0..19"),
        ({"max_prompt_tokens": 1}, "model.max_prompt_tokens: 1"),
        ({"norm_eps": 0.0}, "model.norm_eps: 0.0"),
    ],
)
def test_a_wrong_shape_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)


def test_sizes_come_from_the_data_and_must_agree():
    assert JanusConfig().sized(16384, 576, 1000) == replace(JanusConfig(), vocab_size=16384, num_tokens=576)
    with pytest.raises(UserError, match=r"model.num_tokens: 16, but the token store has 64"):
        TINY.sized(32, 64, 0)
    with pytest.raises(UserError, match=r"model.vocab_size: 0 is not positive"):
        JanusGenerator(JanusConfig())


def test_conditions_that_are_no_left_padded_prompts_are_refused(model, tokens):
    with pytest.raises(UserError, match="Tensor; this generator reads prompts"):
        model(tokens, torch.tensor([0, 1, 2]))
    long = pad_prompts([[BOS] + 8 * [5] + [IMAGE_START]] * 3, PAD)
    with pytest.raises(UserError, match=r"prompts of 10 tokens; model.max_prompt_tokens is 9"):
        model(tokens, long)
    condition = pad_prompts(PROMPTS, PAD)
    right = PromptCondition(condition.tokens.flip(1), condition.mask.flip(1))
    holes = PromptCondition(condition.tokens, condition.mask.clone())
    holes.mask[1, 2] = False
    for wrong in (right, holes):
        with pytest.raises(UserError, match="not padded on the left"):
            check_condition(wrong, model)
    with pytest.raises(UserError, match="prompts: empty"):
        pad_prompts([[BOS, IMAGE_START], []])


def test_it_needs_no_transformers(model, tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = JanusGenerator(TINY).eval()
    again.load_state_dict(model.state_dict())
    condition = pad_prompts(PROMPTS, PAD)
    assert torch.equal(again(tokens, condition)[0], model(tokens, condition)[0])


# Released files


def shapes_of(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("layout", ["authors", "transformers"])
def test_a_whole_file_becomes_two_components_and_itself_again(whole, layout):
    official = authors_file(whole) if layout == "authors" else whole.state_dict()
    records = (AUTHORS, AUTHORS_VQ) if layout == "authors" else (TRANSFORMERS, TRANSFORMERS_VQ)
    assert [record for record in files.OFFICIALS if record.recognises(shapes_of(official))] == [records[0]]
    parts, back = files.split_parts(official), {}
    assert sorted(parts) == ["generator", "tokenizer"]
    for record in records:
        part = parts[record.component]
        assert [r for r in files.OFFICIALS if r.recognises(shapes_of(part))] == [record]
        config = record.config(shapes_of(part))
        ours, unused = record.to_ours(part, config)
        with torch.device("meta"):
            made = VQTokenizer(config) if record.component == "tokenizer" else JanusGenerator(config)
        assert shapes_of(made.state_dict()) == shapes_of(ours)
        back |= record.to_official(ours, unused, config)
    assert set(back) == set(official)
    assert all(back[key] is official[key] for key in official)  # renamed, nothing else
    assert any(key.startswith(("vision_model.", "model.vision_model.")) for key in official)


@torch.inference_mode()
def test_the_tokenizer_in_transformers_layout_computes_the_same(whole, rng):
    part = files.split_parts(whole.state_dict())["tokenizer"]
    config = TRANSFORMERS_VQ.config(shapes_of(part))
    assert (config.vocab_size, config.code_dim, config.channel_multipliers) == (40, 8, (1, 2))
    assert (config.num_res_blocks, config.latent_channels, config.image_size) == (1, 16, 384)
    tokenizer = VQTokenizer(replace(config, image_size=8)).eval()
    tokenizer.load_state_dict(TRANSFORMERS_VQ.to_ours(part, config)[0])
    images = torch.rand(2, 3, 8, 8, generator=rng) * 2 - 1
    theirs = whole.model.vqmodel
    ours = tokenizer.quant_conv(tokenizer.encoder(images))
    torch.testing.assert_close(ours, theirs.quant_conv(theirs.encoder(images)), rtol=1e-4, atol=1e-4)
    # Not compared: its search for the nearest code, which leaves out the authors' normalisation.
    tokens = tokenizer.encode(images)
    torch.testing.assert_close(tokenizer.decode(tokens), theirs.decode(tokens), rtol=1e-4, atol=1e-4)


MANIFESTS = Path(__file__).parents[1] / "goldens" / "manifests"
PRESETS = {"janus_pro_1b_gen": "1B", "janus_pro_7b_gen": "7B"}


@pytest.mark.parametrize("name", PRESETS)
def test_released_generation_parts(name):
    """Exactly the released keys, shapes and count, beside the language model of the preset."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    official = {key: tuple(shape) for key, shape in manifest["state_dict"].items()}
    assert [record for record in files.OFFICIALS if record.recognises(official)] == [AUTHORS]
    config = AUTHORS.config(official)
    assert config == replace(JANUS_PRESETS[PRESETS[name]], vocab_size=16384, num_tokens=576)
    with torch.device("meta"):
        generator = JanusGenerator(config)
        ours, unused = AUTHORS.to_ours({key: torch.empty(shape) for key, shape in official.items()}, config)
    parts = {k: v for k, v in generator.state_dict().items() if not k.startswith("language_model.")}
    assert shapes_of(parts) == shapes_of(ours) and not unused
    assert sum(value.numel() for value in parts.values()) == manifest["total_parameters"]
    whole = AUTHORS.to_official(generator.state_dict(), {}, config)
    assert set(official) < set(whole) and AUTHORS.config(shapes_of(whole)) == config
    recalled = manifest["config"].get("language_config_1b_recalled")
    if recalled:
        own = (config.width, config.mlp_width, config.num_layers, config.num_heads, config.num_key_heads)
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        assert own == tuple(recalled[key] for key in keys)
        assert (config.text_vocab_size, config.norm_eps) == (recalled["vocab_size"], recalled["rms_norm_eps"])
        assert config.rope_base == recalled["rope_theta"]


def test_the_released_tokenizer_under_its_prefix():
    manifest = json.loads((MANIFESTS / "janus_vq16.json").read_text())
    with torch.device("meta"):
        official = {f"gen_vision_model.{key}": torch.empty(shape) for key, shape in manifest["state_dict"].items()}
    assert [record for record in files.OFFICIALS if record.recognises(shapes_of(official))] == [AUTHORS_VQ]
    config = AUTHORS_VQ.config(shapes_of(official))
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    ours, unused = AUTHORS_VQ.to_ours(official, config)
    assert shapes_of(tokenizer.state_dict()) == shapes_of(ours)
    assert (tokenizer.num_tokens, tokenizer.vocab_size, tokenizer.code_dim) == (576, 16384, 8)
    assert sum(value.numel() for value in ours.values()) == manifest["total_parameters"]
    back = AUTHORS_VQ.to_official(ours, unused, config)
    assert {key: id(value) for key, value in back.items()} == {key: id(value) for key, value in official.items()}


def test_no_other_released_file_is_taken_for_janus():
    for path in sorted(MANIFESTS.glob("*.json")):
        shapes = {key: tuple(shape) for key, shape in json.loads(path.read_text())["state_dict"].items()}
        found = [record.name for record in files.OFFICIALS if record.recognises(shapes)]
        assert found == (["Janus generator"] if path.stem in PRESETS else []), path.stem


def test_a_file_of_unknown_width_without_a_language_model_says_so():
    state = AUTHORS.to_official(JanusGenerator(TINY).state_dict(), {}, TINY)
    parts = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("language_model.")}
    with pytest.raises(UserError, match="no released Janus-Pro is 32 wide"):
        AUTHORS.config(parts)
    with pytest.raises(UserError, match="32 wide, not a multiple of the 128"):
        AUTHORS.config(shapes_of(state))
