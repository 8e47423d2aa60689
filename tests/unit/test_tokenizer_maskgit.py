"""MaskGIT's tokenizer: released shapes, the border between [-1, 1] and [0, 1], and its unusual residual blocks."""

from dataclasses import replace

import pytest
import torch
from conftest import stir
from manifests import released_shapes
from rounding import assert_rounding
from torch import nn

from consonar.convert.layouts.official import shapes_of
from consonar.convert.layouts.tokenizers import MASKGIT as OFFICIAL
from consonar.errors import UserError
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer, ResidualBlock

TINY = MaskGITConfig(
    image_size=16, vocab_size=32, code_dim=4, base_channels=8, channel_multipliers=(1, 1, 2), num_res_blocks=1,
    num_groups=4,
)  # fmt: skip


def on_meta(config: MaskGITConfig) -> MaskGITTokenizer:
    with torch.device("meta"):
        return MaskGITTokenizer(config)


@pytest.fixture
def model(rng) -> MaskGITTokenizer:
    """Weights large enough that all of them tell."""
    model = MaskGITTokenizer(TINY).eval()
    stir(model, rng, 0.1)
    return model


def test_the_released_file_is_the_default_configuration():
    assert OFFICIAL.config(released_shapes("maskgit_vqgan_f16_256")) == MaskGITConfig()


def test_the_original_vqgan_is_not_taken_for_it():
    shapes = {
        key.replace(".mid.0.", ".mid.block_1."): shape
        for key, shape in released_shapes("maskgit_vqgan_f16_256").items()
    }
    assert not OFFICIAL.recognises(shapes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_res_blocks": 3, "vocab_size": 4096, "code_dim": 64},
        {"base_channels": 32, "channel_multipliers": (2, 1, 3)},
        {"channel_multipliers": (1,)},
    ],
)
def test_the_configuration_is_read_off_the_shapes(sizes):
    config = MaskGITConfig(**sizes)
    assert OFFICIAL.config(shapes_of(on_meta(config).state_dict())) == config


def test_where_channels_change_the_block_drops_its_input(rng):
    x = torch.randn(1, 8, 4, 4, generator=rng)
    same, wider = ResidualBlock(8, 8, 4), ResidualBlock(8, 16, 4)
    for block in (same, wider):
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(same(x), x)
    assert torch.equal(wider(x), torch.zeros(1, 16, 4, 4))


def test_the_networks_work_on_pixels_from_0_to_1(model, images):
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = model.encode(images)
    torch.testing.assert_close(seen[0] * 2 - 1, images)
    with torch.no_grad():
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.copy_(torch.tensor([0.0, 0.5, 2.0]))
    decoded = model.decode(tokens)
    for channel, value in enumerate((-1.0, 0.0, 3.0)):  # not clamped
        assert (decoded[:, channel] == value).all()


def test_the_training_pass_reconstructs_the_codes_and_reaches_the_encoder(model, images):
    output = model(images)
    assert torch.equal(output.tokens, model.encode(images))
    assert_rounding(output.reconstruction, model.decode(output.tokens), 2000)  # convolutions of 8 to 16 channels
    output.reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 1}, "model.vocab_size: 1 is too small; at least 2"),
        ({"channel_multipliers": ()}, "model.channel_multipliers: empty"),
        ({"image_size": 18}, "model.image_size: 18 is not a multiple of 4"),
        ({"num_groups": 3}, "model.num_groups: 3 does not divide 8 channels"),
        ({"channel_multipliers": (2, 0)}, "model.channel_multipliers: 0 is not positive"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **sizes)
