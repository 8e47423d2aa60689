"""The VQ tokenizer against LlamaGen's (tests/goldens: llamagen_vq_*), with the official keys."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from fill import GOLDENS, compare, fill, load, make_image, make_tokens
from torch.nn import functional as F

from consonar.tokenizers import quantizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer

CASES = {
    "llamagen_vq_tiny16": ((2, 3, 32, 32), {"channel_multipliers": (1, 1, 2), "latent_channels": 64}),
    "llamagen_vq_tiny8_nol2": (
        (2, 3, 16, 16), {"channel_multipliers": (1, 2), "latent_channels": 32, "l2_normalize": False}
    ),
    "llamagen_vq16_full": ((1, 3, 32, 32), {"channel_multipliers": (1, 1, 2, 2, 4), "latent_channels": 256}),
}  # fmt: skip
COVERED = {
    "pre_quant", "indices", "quant", "index_margin", "rec", "forward_rec", "tokens", "codebook_entry", "decode_code",
    "train_losses",
}  # fmt: skip
# A buffer of the official module that only feeds its log; ours counts usage outside of the module.
OFFICIAL_ONLY = {"quantize.codebook_used"}


@lru_cache
def filled(name: str) -> VQTokenizer:
    meta = load(name)[1]
    shape, settings = CASES[name]
    arguments = meta["config"]["ModelArgs"]
    config = VQConfig(
        image_size=shape[-1], vocab_size=arguments["codebook_size"], code_dim=arguments["codebook_embed_dim"],
        base_channels=meta["config"]["ch"], num_res_blocks=2, **settings,
    )  # fmt: skip
    return fill(VQTokenizer(config).eval(), meta["codebook_keys"])


def as_map(codes: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """(B, N, C) as the official (B, C, h, w)."""
    return codes.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_every_array(name):
    arrays, meta = load(name)
    assert set(meta["arrays"]) == COVERED
    tokenizer, images = filled(name), make_image(CASES[name][0])
    shape = meta["arrays"]["quant"]["shape"]
    latents = tokenizer.quant_conv(tokenizer.encoder(images))
    compare(name, "pre_quant", latents)
    tokens = tokenizer.encode(images)
    clear = arrays["index_margin"] > 1e-4
    assert clear.mean() > 0.9
    assert (tokens.numpy() == arrays["indices"])[clear].all()
    distances = quantizer.squared_distances(tokenizer.vectors(images), tokenizer.codebook).view(*tokens.shape, -1)
    best = distances.topk(2, largest=False).values
    compare(name, "index_margin", best[..., 1] - best[..., 0])
    golden_tokens = torch.from_numpy(arrays["indices"])
    compare(name, "quant", as_map(tokenizer.embed(golden_tokens), shape))
    compare(name, "rec", tokenizer.decode(golden_tokens))
    compare(name, "forward_rec", tokenizer(images).reconstruction)
    given = make_tokens(tuple(tokens.shape), tokenizer.vocab_size)
    compare(name, "tokens", given)
    compare(name, "codebook_entry", as_map(tokenizer.embed(given), shape))
    compare(name, "decode_code", tokenizer.decode(given))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_training_losses(name):
    """Codebook and commitment terms; the third entry is LlamaGen's entropy term, which we do not have."""
    output = filled(name)(make_image(CASES[name][0]))
    ours = [
        quantizer.codebook_loss(output.vectors, output.codes),
        0.25 * quantizer.commitment_loss(output.vectors, output.codes),
    ]
    np.testing.assert_allclose([float(x) for x in ours], load(name)[0]["train_losses"][:2], rtol=1e-4)


def test_codes_are_on_the_sphere_only_with_l2_normalize():
    norms = {name: filled(name).codebook.norm(dim=1) for name in ("llamagen_vq_tiny16", "llamagen_vq_tiny8_nol2")}
    torch.testing.assert_close(norms["llamagen_vq_tiny16"], torch.ones(60))
    raw = filled("llamagen_vq_tiny8_nol2").quantize.embedding.weight
    assert torch.equal(filled("llamagen_vq_tiny8_nol2").codebook, raw)
    torch.testing.assert_close(F.normalize(raw, dim=1).norm(dim=1), torch.ones(60))


@pytest.mark.parametrize(("name", "multipliers"), [("vq-16", (1, 1, 2, 2, 4)), ("vq-8", (1, 2, 2, 4))])
def test_released_shapes(name, multipliers):
    released = json.loads((GOLDENS / "manifests" / f"llamagen_{name}.json").read_text())["state_dict"]
    with torch.device("meta"):
        tokenizer = VQTokenizer(
            VQConfig(
                image_size=256, vocab_size=16384, base_channels=128, channel_multipliers=multipliers, num_res_blocks=2,
                latent_channels=256,
            )
        )  # fmt: skip
    ours = {key: list(value.shape) for key, value in tokenizer.state_dict().items()}
    assert ours == {key: shape for key, shape in released.items() if key not in OFFICIAL_ONLY}
    assert set(released) - set(ours) == OFFICIAL_ONLY
