"""MaskGIT's tokenizer: released shapes, the border between [-1, 1] and [0, 1], and its unusual residual blocks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from consonar.errors import UserError
from consonar.tokenizers.conv import ResidualBlock
from consonar.tokenizers.maskgit import OFFICIAL, MaskGITConfig, MaskGITTokenizer

FOLDER = Path(__file__).parents[1] / "goldens" / "manifests"
MANIFESTS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
RELEASED = "maskgit_vqgan_f16_256"
TINY = MaskGITConfig(
    image_size=16, vocab_size=32, code_dim=4, base_channels=8, channel_multipliers=(1, 1, 2), num_res_blocks=1,
    num_groups=4,
)  # fmt: skip


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in MANIFESTS[name]["state_dict"].items()}


def on_meta(config: MaskGITConfig) -> MaskGITTokenizer:
    with torch.device("meta"):
        return MaskGITTokenizer(config)


@pytest.fixture
def model(rng) -> MaskGITTokenizer:
    """Weights large enough that all of them tell."""
    model = MaskGITTokenizer(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.fixture
def images(rng) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1


def test_the_released_file_is_the_default_configuration_with_its_own_keys():
    shapes = released_shapes(RELEASED)
    assert OFFICIAL.recognises(shapes)
    config = OFFICIAL.config(shapes)
    assert config == MaskGITConfig()
    model = on_meta(config)
    assert shapes_of(model.state_dict()) == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == MANIFESTS[RELEASED]["total_parameters"]
    assert (model.num_tokens, model.image_size) == (256, 256)


@pytest.mark.parametrize("name", sorted(set(MANIFESTS) - {RELEASED}))
def test_no_other_released_file_is_taken_for_it(name):
    assert not OFFICIAL.recognises(released_shapes(name))


def test_the_original_vqgan_is_not_taken_for_it():
    shapes = {key.replace(".mid.0.", ".mid.block_1."): shape for key, shape in released_shapes(RELEASED).items()}
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


def test_a_module_on_the_meta_device_takes_released_weights(model, images):
    state = model.state_dict()
    ours, unused = OFFICIAL.to_ours(state, TINY)
    other = on_meta(TINY).eval()
    other.load_state_dict(ours, assign=True)
    assert torch.equal(other.encode(images), model.encode(images))
    assert torch.equal(other(images).reconstruction, model(images).reconstruction)
    back = OFFICIAL.to_official(ours, unused, TINY)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


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
    torch.testing.assert_close(output.reconstruction, model.decode(output.tokens))
    output.reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size: 0 is not positive"),
        ({"channel_multipliers": ()}, "model.channel_multipliers: empty"),
        ({"image_size": 18}, "model.image_size: 18 is not a multiple of 4"),
        ({"num_groups": 3}, "model.num_groups: 3 does not divide 8 channels"),
        ({"channel_multipliers": (2, 0)}, "does not divide 0 channels"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **sizes)
