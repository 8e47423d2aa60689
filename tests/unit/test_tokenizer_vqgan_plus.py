"""VQGAN+: released shapes, its options, and lookup-free codes."""

from dataclasses import replace

import pytest
import torch
from conftest import stir
from manifests import released_shapes
from rounding import assert_rounding

from consonar.components import load_tokenizer, save_tokenizer
from consonar.convert.layouts.official import shapes_of
from consonar.convert.layouts.tokenizers import VQGAN_PLUS as OFFICIAL
from consonar.errors import UserError
from consonar.tokenizers import quantizer
from consonar.tokenizers.vqgan import VQGANPlusConfig, VQGANPlusTokenizer, sign_codes, sign_tokens

TINY = VQGANPlusConfig(
    image_size=16, vocab_size=32, code_dim=5, base_channels=8, channel_multipliers=(1, 1, 2), num_res_blocks=1,
    num_groups=4,
)  # fmt: skip
TINY_BITS = replace(TINY, quantizer="lookup-free")


def on_meta(config: VQGANPlusConfig) -> VQGANPlusTokenizer:
    with torch.device("meta"):
        return VQGANPlusTokenizer(config)


def drawn(config: VQGANPlusConfig, rng: torch.Generator) -> VQGANPlusTokenizer:
    """A model whose weights are large enough that all of them tell."""
    model = VQGANPlusTokenizer(config).eval()
    stir(model, rng, 0.1)
    return model


def test_the_released_file_is_the_default_configuration():
    assert OFFICIAL.config(released_shapes("vqplus")) == VQGANPlusConfig()


def test_a_decoder_stored_from_high_to_low_resolution_is_not_taken_for_it():
    last = len(VQGANPlusConfig().channel_multipliers) - 1
    shapes = {
        ".".join(str(last - int(part)) if key.startswith("decoder.up.") and i == 2 else part
                 for i, part in enumerate(key.split("."))): shape
        for key, shape in released_shapes("vqplus").items()
    }  # fmt: skip
    assert shapes.keys() != released_shapes("vqplus").keys()
    assert not OFFICIAL.recognises(shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"downsample": "average"},
        {"num_decoder_blocks": 3, "vocab_size": 1024, "code_dim": 256},
        {"quantizer": "lookup-free", "vocab_size": 2**14, "code_dim": 14},
        {"quantizer": "lookup-free", "vocab_size": 2**6, "code_dim": 6, "channel_multipliers": (1,)},
    ],
)
def test_the_configuration_is_read_off_the_shapes(options):
    config = VQGANPlusConfig(base_channels=32, **options)
    official = OFFICIAL.to_official(dict(on_meta(config).state_dict()), {}, config)
    assert OFFICIAL.recognises(shapes_of(official))
    assert OFFICIAL.config(shapes_of(official)) == config


@pytest.mark.parametrize("config", [TINY, TINY_BITS, replace(TINY, downsample="average", l2_normalize=True)])
def test_released_weights_load_and_return_bit_for_bit(config, rng, images):
    model = drawn(config, rng)
    official = OFFICIAL.to_official(model.state_dict(), {}, config)
    ours, unused = OFFICIAL.to_ours(official, config)
    other = on_meta(config).eval()
    other.load_state_dict(ours, assign=True)
    assert_rounding(other(images).reconstruction, model(images).reconstruction, 2000)
    back = OFFICIAL.to_official(ours, unused, config)
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


def test_a_stored_table_of_codes_returns_as_it_was(rng):
    official = OFFICIAL.to_official(drawn(TINY_BITS, rng).state_dict(), {}, TINY_BITS)
    official["quantize.codebook"] = 3 * official["quantize.codebook"]
    back = OFFICIAL.to_official(*OFFICIAL.to_ours(official, TINY_BITS), TINY_BITS)
    assert torch.equal(back["quantize.codebook"], official["quantize.codebook"])
    assert back["quantize.bits_to_indices"].dtype == torch.int32


def test_bit_i_of_a_token_is_the_sign_of_channel_i():
    assert sign_codes(torch.tensor([1, 6]), 3).tolist() == [[1, -1, -1], [-1, 1, 1]]
    assert sign_tokens(torch.tensor([[0.2, -3.0, 0.0], [-0.1, 0.0, 5.0]])).tolist() == [1, 4]
    tokens = torch.arange(2**14).view(2, -1)
    assert torch.equal(sign_tokens(sign_codes(tokens, 14)), tokens)


def test_lookup_free_codes_are_the_nearest_signs_and_no_weights(rng, images):
    model = drawn(TINY_BITS, rng)
    assert not any(key.startswith("quantize") for key in model.state_dict())
    assert torch.equal(model.codebook, model.embed(torch.arange(32)))
    assert model.codebook.abs().unique().tolist() == [1] and len(model.codebook.unique(dim=0)) == 32
    tokens = model.encode(images)
    assert len(tokens.unique()) > 4
    assert torch.equal(tokens.flatten(), quantizer.nearest_code(model.vectors(images), model.codebook))
    assert torch.equal(model.decode(tokens), model.decode_embeddings(model.embed(tokens)))


def test_lookup_free_training_reaches_the_encoder_through_the_signs(rng, images):
    model = drawn(TINY_BITS, rng)
    output = model(images)
    assert_rounding(output.reconstruction, model.decode(output.tokens), 2000)  # convolutions of 8 to 16 channels
    output.reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY_BITS, replace(TINY, downsample="average", num_decoder_blocks=2)])
def test_options_survive_a_file(config, rng, images, tmp_path):
    model = drawn(config, rng)
    save_tokenizer(model, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.config == config and loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.encode(images), model.encode(images))


def test_normalised_codes_have_unit_norm_and_do_not_know_their_scale(rng, images):
    model = drawn(replace(TINY, l2_normalize=True), rng)
    before, decoded = model.encode(images), model.decode(model.encode(images))
    torch.testing.assert_close(model.embed(before).norm(dim=-1), torch.ones(before.shape))
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(torch.linspace(0.5, 4, 32)[:, None])
    assert torch.equal(model.encode(images), before)
    assert_rounding(model.decode(before), decoded, 2000)


def test_a_stride_2_convolution_keeps_the_grid_and_pads_right_and_below(rng):
    model = drawn(replace(TINY, channel_multipliers=(1, 1)), rng)
    conv, seen = model.encoder.down[0].down_conv, []
    conv.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    model.encode(torch.ones(1, 3, 16, 16))
    padded = torch.nn.functional.pad(seen[0], (0, 1, 0, 1))
    assert padded.shape[2:] == (17, 17) and model.num_tokens == 64
    assert torch.equal(torch.nn.functional.conv2d(padded, conv.weight, conv.bias, stride=2), seen[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "free"}, "model.quantizer: unknown 'free'.*choices: lookup, lookup-free"),
        ({"downsample": "max"}, "model.downsample: unknown 'max'; choices: convolution, average"),
        ({"num_decoder_blocks": 0}, "model.num_decoder_blocks: 0 is not positive"),
        ({"quantizer": "lookup-free", "vocab_size": 31}, "model.vocab_size: 31; lookup-free codes of 5 bits"),
        ({"quantizer": "lookup-free", "l2_normalize": True}, "model.l2_normalize: True"),
        ({"image_size": 15}, "model.image_size: 15 is not a multiple of 4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **options)
