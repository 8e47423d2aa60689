"""TiTok: released shapes, configurations from shapes, the two forms, and what is refused. Values: tests/parity."""

import json
from dataclasses import replace

import pytest
import torch
from manifests import manifest, names, released_shapes
from rounding import assert_rounding

from consonar.config_io import from_dict, to_dict
from consonar.convert.layouts.official import shapes_of
from consonar.convert.layouts.tokenizers import TITOK as OFFICIAL
from consonar.errors import UserError
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vit import TransformerConfig, patches_to_image
from consonar.tokenizers.vqgan import MaskGITConfig

RELEASED = names("tokenizer_titok_*")
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
PIXELS = MaskGITConfig(
    image_size=16, vocab_size=24, code_dim=6, base_channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1
)
SIDE = TransformerConfig(width=64, num_layers=2, num_heads=1, patch_size=4)
FIRST_FORM = TiTokConfig(
    image_size=16, vocab_size=20, code_dim=5, num_tokens=6, encoder=replace(SIDE, patch_size=8),
    decoder=replace(SIDE, width=128, num_heads=2, num_layers=1), pixel_decoder=PIXELS,
)  # fmt: skip
SECOND_FORM = replace(FIRST_FORM, l2_normalize=False, pixel_decoder=None)
FORMS = {"first": FIRST_FORM, "second": SECOND_FORM}


@pytest.fixture(params=FORMS)
def model(request) -> TiTokTokenizer:
    torch.manual_seed(0)
    return TiTokTokenizer(FORMS[request.param]).eval()


def test_all_released_files_are_here():
    assert len(RELEASED) == 6


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_gives_its_published_sizes(name):
    published, config = manifest(name)["config"], OFFICIAL.config(released_shapes(name))
    for side, key in ((config.encoder, "vit_enc"), (config.decoder, "vit_dec")):
        assert (side.width, side.num_layers, side.num_heads) == SIZES[published[f"{key}_model_size"]]
        assert side.patch_size == published[f"{key}_patch_size"]
    assert (config.vocab_size, config.code_dim) == (published["codebook_size"], published["token_size"])
    assert (config.image_size, config.num_tokens) == (256, published["num_latent_tokens"])
    assert config.l2_normalize == published["use_l2_norm"]
    assert config.pixel_decoder == (MaskGITConfig() if published["finetune_decoder"] else None)


def test_text_aware_and_continuous_relatives_are_not_recognised(model):
    shapes = shapes_of(model.state_dict())
    assert OFFICIAL.recognises(shapes)
    assert not OFFICIAL.recognises(shapes | {"decoder.text_guidance_proj.weight": (64, 768)})
    assert not OFFICIAL.recognises({key: value for key, value in shapes.items() if not key.startswith("quantize.")})


def test_conversion_there_and_back_is_exact_and_the_shapes_tell_the_configuration(model):
    official = model.state_dict()
    config = OFFICIAL.config(shapes_of(official))
    assert config == model.config
    ours, unused = OFFICIAL.to_ours(dict(official), config)
    with torch.device("meta"):
        empty = TiTokTokenizer(config).eval()
    empty.load_state_dict(ours, assign=True)
    tokens = torch.arange(model.num_tokens)[None]
    assert torch.equal(empty.decode(tokens), model.decode(tokens))
    back = OFFICIAL.to_official(empty.state_dict(), unused, config)
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_configuration_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config))), "config.json", TiTokConfig) == config


def test_tokens_have_no_places_and_need_not_be_a_square(model):
    assert model.grid is None
    tokens = model.encode(torch.rand(3, 3, 16, 16) * 2 - 1)
    assert tokens.shape == (3, 6)
    assert model.decode(tokens).shape == (3, 3, 16, 16)
    assert model.embed(tokens[:, :4]).shape == (3, 4, 5)


def test_another_number_of_tokens_is_refused(model):
    """One token would otherwise be broadcast to all places."""
    for count in (1, 7):
        with pytest.raises(UserError, match=f"titok: {count} tokens per image, this tokenizer decodes 6"):
            model.decode(torch.zeros(2, count, dtype=torch.int64))


def test_train_mode_changes_nothing(model):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens, decoded = model.encode(images), model.decode(model.encode(images))
    model.train()
    assert torch.equal(model.encode(images), tokens) and torch.equal(model.decode(tokens), decoded)


def test_every_code_moves_the_image_and_images_reach_the_encoder(model):
    codes = model.embed(torch.arange(6)[None]).detach().requires_grad_()
    model.decode_embeddings(codes).square().mean().backward()
    assert (codes.grad.abs().sum(2) > 0).all()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images)
    assert torch.equal(output.tokens, model.encode(images))
    assert_rounding(output.reconstruction, model.decode(output.tokens), 2000)  # widths 16 to 64, two halves
    output.reconstruction.square().mean().backward()
    assert model.encoder.patch_embed.weight.grad.abs().sum() > 0 and model.latent_tokens.grad.abs().sum() > 0


def test_codes_are_on_the_sphere_in_the_first_form_only():
    first, second = TiTokTokenizer(FIRST_FORM), TiTokTokenizer(SECOND_FORM)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(first.embed(tokens).norm(dim=2), torch.ones(1, 20))
    torch.testing.assert_close(first.vectors(torch.zeros(2, 3, 16, 16)).norm(dim=1), torch.ones(12))
    assert torch.equal(second.embed(tokens)[0], second.quantize.embedding.weight)


def test_the_first_form_reads_its_latents_without_a_transposition():
    """`conv_out` picks channel 1: of every token in the second form, the second six of all numbers in the first."""
    torch.manual_seed(0)
    first, second = TiTokTokenizer(FIRST_FORM).encoder, TiTokTokenizer(SECOND_FORM).encoder
    torch.nn.init.zeros_(first.conv_out.weight).data[0, 1] = 1.0
    second.load_state_dict(first.state_dict())
    images, queries = torch.rand(1, 3, 16, 16), torch.randn(6, 64)
    latents = []
    second.ln_post.register_forward_hook(lambda module, inputs, output: latents.append(output[0]))  # (N, D)
    torch.testing.assert_close(second(images, queries)[0, :, 0], latents[0][:, 1])
    torch.testing.assert_close(first(images, queries)[0, :, 0], latents[0].flatten()[6:12])


def test_patches_are_laid_out_row_column_colour():
    patch, rows = 4, 2
    x = torch.arange(patch * patch * 3 * rows * rows).view(1, -1, rows, rows)
    image = patches_to_image(x, patch)
    for row, column, colour, y, z in ((0, 0, 0, 0, 0), (3, 1, 2, 1, 0), (2, 3, 1, 0, 1)):
        assert image[0, colour, y * patch + row, z * patch + column] == x[0, (row * patch + column) * 3 + colour, y, z]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(SECOND_FORM, num_tokens=0), r"model\.num_tokens: 0"),
        (lambda: replace(SECOND_FORM, code_dim=0), r"model\.code_dim: 0"),
        (lambda: replace(SECOND_FORM, encoder=replace(SIDE, num_heads=3)), r"model\.encoder\.num_heads: 3 .*64"),
        (lambda: replace(SECOND_FORM, decoder=replace(SIDE, num_layers=0)), r"model\.decoder\.num_layers: 0"),
        (lambda: replace(SECOND_FORM, decoder=replace(SIDE, patch_size=5)), r"model\.decoder\.patch_size: 5 .*16"),
        (
            lambda: replace(FIRST_FORM, decoder=replace(SIDE, patch_size=8)),
            r"model\.decoder\.patch_size: 8 .* 4 pixels",
        ),
        (
            lambda: replace(FIRST_FORM, pixel_decoder=replace(PIXELS, image_size=32)),
            r"model\.pixel_decoder\.image_size: 32 .* 16",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        change()
