"""What every registered tokenizer keeps: shapes, determinism, one decoder input, fingerprint, frozen weights."""

import pytest
import torch

from consonar.components import load_tokenizer, save_tokenizer
from consonar.data.transforms import to_uint8
from consonar.errors import UserError
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.checked import check_tokenizer
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer, VQGANPlusConfig, VQGANPlusTokenizer
from consonar.types import Tokenizer

TINY_CONV = {
    "image_size": 16, "base_channels": 8, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "num_groups": 4,
}  # fmt: skip
TINY_SIDE = TransformerConfig(width=32, num_layers=2, num_heads=4, patch_size=4)
TINY_VIT = {"image_size": 16, "vocab_size": 32, "code_dim": 4, "encoder": TINY_SIDE, "decoder": TINY_SIDE}
TINY_PIXELS = MaskGITConfig(vocab_size=16, code_dim=4, **TINY_CONV)


@pytest.fixture(params=TOKENIZERS)
def model(request, tokenizer):
    """One tiny model of each kind, frozen; a new kind needs its own line here."""
    models = {
        "vq": lambda: tokenizer,
        "maskgit-vq": lambda: MaskGITTokenizer(MaskGITConfig(vocab_size=32, code_dim=4, **TINY_CONV)),
        "vqgan-plus": lambda: VQGANPlusTokenizer(VQGANPlusConfig(vocab_size=32, code_dim=4, **TINY_CONV)),
        "titok": lambda: TiTokTokenizer(TiTokConfig(num_tokens=6, pixel_decoder=TINY_PIXELS, **TINY_VIT)),
        "alitok": lambda: AliTokTokenizer(AliTokConfig(num_prefix_tokens=3, num_buffer_tokens=2, **TINY_VIT)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models[request.param]().eval().requires_grad_(False)


@pytest.fixture
def images(model, rng):
    return torch.rand(5, 3, model.image_size, model.image_size, generator=rng) * 2 - 1


def test_it_is_a_tokenizer(model):
    assert isinstance(model, Tokenizer)
    assert model.grid is None or model.grid.num_tokens == model.num_tokens
    check_tokenizer(model, "what is asked of those of other packages")


def test_shapes_and_ranges(model, images):
    tokens = model.encode(images)
    assert tokens.shape == (5, model.num_tokens) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < model.vocab_size
    codes = model.embed(tokens)
    assert codes.shape == (5, model.num_tokens, model.code_dim) and codes.dtype == torch.float32
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.isfinite().all()


def test_encoding_is_deterministic_and_independent_of_the_batch(model, images):
    tokens = model.encode(images)
    assert torch.equal(tokens, model.encode(images))
    assert torch.equal(tokens, torch.cat([model.encode(images[i : i + 1]) for i in range(5)]))


def test_decode_is_decode_embeddings_of_embed(model, images):
    tokens = model.encode(images)
    assert torch.equal(model.decode(tokens), model.decode_embeddings(model.embed(tokens)))


def test_every_token_has_an_embedding_of_its_own(model):
    codes = model.embed(torch.arange(model.vocab_size)[None])[0]
    assert len(codes.unique(dim=0)) == model.vocab_size


def test_decode_embeddings_carries_gradient(model, images):
    codes = model.embed(model.encode(images)).requires_grad_()
    model.decode_embeddings(codes).square().mean().backward()
    assert codes.grad is not None and (codes.grad.abs().sum((0, 2)) > 0).all()


def test_images_of_another_size_are_refused(model):
    with pytest.raises(UserError, match=rf"{model.name}.*\(3, 20, 20\)"):
        model.encode(torch.zeros(1, 3, 20, 20))


def test_what_are_no_images_is_refused(model, images):
    numbers = [images * 127.5 + 127.5, images + torch.nan, images / 0]
    types = [to_uint8(images), images.double(), images.half(), images.numpy(), [1]]
    for wrong in numbers + types:
        words = "to .*in \\[-1, 1\\]" if any(wrong is x for x in numbers) else "tensor of torch.float32"
        for read in (model.encode, model):
            with pytest.raises(UserError, match=rf"{model.name}: .*{words}"):
                read(wrong)
    assert len(model.encode(images * 1.4)) == 5  # decoded ones overshoot


def test_what_are_no_tokens_is_refused(model, images):
    tokens = model.encode(images)
    for wrong in (tokens - model.vocab_size, tokens + model.vocab_size, tokens.float(), tokens[0], tokens.tolist()):
        with pytest.raises(UserError, match=rf"{model.name}: .*(from 0 to {model.vocab_size - 1}|tensor of int64)"):
            model.decode(wrong)
    assert torch.equal(model.decode(tokens), model.decode(tokens.int()))


def test_fingerprint(model, tmp_path):
    before = model.fingerprint
    save_tokenizer(model, tmp_path / "same")
    assert load_tokenizer(tmp_path / "same").fingerprint == before
    key = next(iter(model.state_dict()))
    with torch.no_grad():
        model.state_dict()[key].view(-1)[0] += 1e-3
    assert model.fingerprint != before
    save_tokenizer(model, tmp_path / "half", dtype="float16")
    rounded = load_tokenizer(tmp_path / "half")
    assert rounded.fingerprint != model.fingerprint  # the fingerprint is that of the rounded weights
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.7 * (
        (tmp_path / "same" / "model.safetensors").stat().st_size
    )


def test_bf16_weights_search_and_give_float32(model, images):
    """The nearest of float32 codes to what the networks say; pictures in float32, off by the rounding of bf16."""
    tokens, decoded = model.encode(images), model.decode(model.encode(images))
    model.bfloat16()
    assert model.dtype == torch.bfloat16 and model.codebook.dtype == torch.float32
    vectors = model.vectors(images)
    distances = torch.cdist(vectors.double(), model.codebook.double())
    chosen = distances.gather(1, model.encode(images).flatten()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-5, atol=1e-6)
    assert vectors.dtype == torch.float32 and (model.encode(images) == tokens).float().mean() > 0.5
    low = model.decode(tokens)
    assert low.dtype == torch.float32 and 0 < (low - decoded).abs().mean() < 0.05


def test_loaded_tokenizers_are_frozen(model):
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
