"""Vector quantisation and the VQ tokenizer's own parts."""

import math

import pytest
import torch
from rounding import assert_rounding
from torch.nn import functional as F

from consonar.components import load_tokenizer
from consonar.errors import UserError
from consonar.tokenizers import quantizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer

CODEBOOK = torch.tensor([[0.0, 0], [1, 0], [0, 2]])
VECTORS = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.1, 1.5]])


def test_nearest_code_and_distances(rng):
    assert quantizer.nearest_code(VECTORS, CODEBOOK).tolist() == [0, 1, 2]
    a, b = torch.randn(9, 5, generator=rng), torch.randn(7, 5, generator=rng)
    torch.testing.assert_close(quantizer.squared_distances(a, b), torch.cdist(a, b) ** 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(quantizer.nearest_code(b, b), torch.arange(7))


def test_straight_through_has_the_codes_values_and_the_vectors_gradient():
    vectors, codes = VECTORS.clone().requires_grad_(), CODEBOOK.clone().requires_grad_()
    passed = quantizer.straight_through(vectors, codes)
    torch.testing.assert_close(passed, codes)
    (passed * torch.tensor([2.0, 3.0])).sum().backward()
    assert codes.grad is None and torch.equal(vectors.grad, torch.tensor([[2.0, 3.0]] * 3))


def test_losses_are_equal_and_move_one_side_each():
    for loss, moves_codes in ((quantizer.codebook_loss, True), (quantizer.commitment_loss, False)):
        vectors, codes = VECTORS.clone().requires_grad_(), CODEBOOK.clone().requires_grad_()
        value = loss(vectors, codes)
        assert value.item() == pytest.approx((0.16 + 0.16 + 0.01 + 0.25) / 6)
        value.backward()
        assert (codes.grad is not None) == moves_codes and (vectors.grad is not None) == (not moves_codes)


def test_usage_and_perplexity():
    counts = quantizer.code_counts(torch.tensor([[0, 1], [1, 3]]), 5)
    assert counts.tolist() == [1, 2, 0, 1, 0] and quantizer.usage(counts) == pytest.approx(0.6)
    assert quantizer.perplexity(torch.full((8,), 3)) == pytest.approx(8)
    assert quantizer.perplexity(torch.tensor([5, 0, 0])) == pytest.approx(1)
    expected = math.exp(2 * 0.25 * math.log(4) + 0.5 * math.log(2))
    assert quantizer.perplexity(counts) == pytest.approx(expected)


def test_tokens_are_in_raster_order(tokenizer, rng):
    """Vector and code 4 r + c belong to row r, column c of the map."""
    latents = torch.randn(1, 4, 4, 4, generator=rng)
    tokenizer.quant_conv.register_forward_hook(lambda *_: latents)
    vectors = tokenizer.vectors(torch.zeros(1, 3, 16, 16))
    for row, column in ((0, 0), (0, 3), (2, 1)):
        torch.testing.assert_close(vectors[4 * row + column], F.normalize(latents[0, :, row, column], dim=0))
    seen = []
    tokenizer.post_quant_conv.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    tokenizer.decode_embeddings(torch.arange(16.0)[None, :, None].expand(1, 16, 4))
    assert torch.equal(seen[0], torch.arange(16.0).view(1, 1, 4, 4).expand(1, 4, 4, 4))


def test_training_pass_equals_encode_and_decode(tokenizer, rng):
    images = torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1
    output = tokenizer(images)
    assert torch.equal(output.tokens, tokenizer.encode(images))
    assert_rounding(output.reconstruction, tokenizer.decode(output.tokens), 2000)
    torch.testing.assert_close(output.vectors.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(output.codes, tokenizer.embed(output.tokens).flatten(0, 1))


def test_reconstruction_gradient_reaches_the_encoder(tokenizer, rng):
    tokenizer.requires_grad_(True)
    images = torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1
    F.mse_loss(tokenizer(images).reconstruction, images).backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.quantize.embedding.weight.grad is None  # the codebook has a loss of its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, r"model\.image_size: 18 is not a multiple of 8"),
        ({"base_channels": 12}, r"model\.num_groups: 32 does not divide 12 channels"),
        ({"channel_multipliers": ()}, r"model\.channel_multipliers: empty"),
        ({"vocab_size": 0}, r"model\.vocab_size: 0 is too small; at least 2"),
    ],
)
def test_wrong_shapes(changes, message):
    with pytest.raises(UserError, match=message):
        VQConfig(**changes)


def test_unknown_tokenizer_names_the_choices():
    with pytest.raises(UserError, match=r"tokenizer: unknown 'openmoji-46' \(did you mean 'openmoji-64'\?\)"):
        load_tokenizer("openmoji-46")


def test_grid():
    tokenizer = VQTokenizer(VQConfig(image_size=32, channel_multipliers=(1, 1), base_channels=32))
    assert (tokenizer.grid.rows, tokenizer.grid.columns, tokenizer.num_tokens) == (16, 16, 256)
