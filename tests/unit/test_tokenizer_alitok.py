"""AliTok's tokenizer: released shapes, configurations from shapes, its order of tokens, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from manifests import released_shapes
from rounding import assert_rounding

from consonar.config_io import from_dict, to_dict
from consonar.convert.layouts.official import shapes_of
from consonar.convert.layouts.tokenizers import ALITOK as OFFICIAL
from consonar.errors import UserError
from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.vit import TransformerConfig
from consonar.types import Grid

SIDE = TransformerConfig(width=64, num_layers=2, num_heads=1, patch_size=4)
TINY = AliTokConfig(
    image_size=16, vocab_size=20, code_dim=5, num_prefix_tokens=3, num_buffer_tokens=2,
    encoder=replace(SIDE, patch_size=8), decoder=replace(SIDE, width=128, num_heads=2, num_layers=1),
)  # fmt: skip


@pytest.fixture
def model() -> AliTokTokenizer:
    torch.manual_seed(0)
    return AliTokTokenizer(TINY).eval()


def test_the_released_file_is_the_default_configuration():
    assert OFFICIAL.config(released_shapes("alitok_tokenizer")) == AliTokConfig()
    assert AliTokConfig().grid == Grid(16, 16, prefix=17)


@pytest.mark.parametrize("changes", [{}, {"num_prefix_tokens": 0}, {"num_buffer_tokens": 0}])
def test_conversion_there_and_back_is_exact_and_the_shapes_tell_the_configuration(changes):
    model = AliTokTokenizer(replace(TINY, **changes)).eval()
    official = model.state_dict()
    config = OFFICIAL.config(shapes_of(official))
    assert config == model.config
    ours, unused = OFFICIAL.to_ours(dict(official), config)
    with torch.device("meta"):
        empty = AliTokTokenizer(config).eval()
    empty.load_state_dict(ours, assign=True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = model.encode(images)
    assert torch.equal(empty.encode(images), tokens) and torch.equal(empty.decode(tokens), model.decode(tokens))
    back = OFFICIAL.to_official(empty.state_dict(), unused, config)
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


def test_configuration_survives_json():
    assert from_dict(json.loads(json.dumps(to_dict(TINY))), "config.json", AliTokConfig) == TINY


def test_the_prefix_comes_first_and_the_image_is_made_at_the_grid(model):
    """With the decoder's blocks emptied, no position sees another: prefix tokens then do not reach the image."""
    assert model.grid == Grid(4, 4, prefix=3) and model.num_tokens == 19
    for block in model.decoder.transformer:
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    codes = torch.randn(1, 19, 5)
    before = model.decode_embeddings(codes)
    for position in (0, 2, 3, 8, 18):
        changed = codes.clone()
        changed[:, position] += 1.0
        touched = (model.decode_embeddings(changed) != before).any(1)[0].view(4, 4, 4, 4).any(3).any(1)  # (h, w)
        expected = torch.zeros(4, 4, dtype=torch.bool)
        if position >= 3:
            expected[(position - 3) // 4, (position - 3) % 4] = True
        assert torch.equal(touched, expected)


def test_decoded_images_are_within_the_range(model):
    decoded = model.decode_embeddings(1e3 * torch.randn(4, 19, 5))
    assert decoded.min() >= -1 and decoded.max() <= 1 and decoded.min() < 0 < decoded.max()


def test_codes_are_not_normalised(model):
    assert torch.equal(model.embed(torch.arange(20)[None])[0], model.quantize.embedding.weight)
    assert (model.codebook.norm(dim=1) < 0.9).all()
    assert (model.vectors(torch.rand(2, 3, 16, 16)).norm(dim=1) - 1).abs().min() > 1e-3


def test_the_training_pass_reconstructs_the_encoded_image_and_reaches_the_encoder(model):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images)
    assert torch.equal(output.tokens, model.encode(images))
    assert_rounding(output.reconstruction, model.decode(output.tokens), 2000)  # widths 16 to 64, two halves
    output.reconstruction.square().mean().backward()
    for parameter in (model.encoder.patch_embed.weight, model.latent_tokens, model.decoder.class_embedding):
        assert parameter.grad.abs().sum() > 0


def test_another_number_of_tokens_is_refused(model):
    with pytest.raises(UserError, match="alitok: 16 tokens per image, this tokenizer decodes 19"):
        model.decode(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prefix_tokens": -1}, r"model\.num_prefix_tokens: -1 is negative"),
        ({"vocab_size": 0}, r"model\.vocab_size: 0"),
        ({"image_size": 20}, r"model\.encoder\.patch_size: 8 does not divide the image_size 20"),
        (
            {"decoder": replace(SIDE, num_heads=5)},
            r"model\.decoder\.num_heads: 5 does not divide model\.decoder\.width 64",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)
