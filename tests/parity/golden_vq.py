"""The VQ tokenizer against LlamaGen's, with the official keys."""

import re

import numpy as np
import torch
from fill import fill
from golden import Golden

from consonar.tokenizers import quantizer
from consonar.tokenizers.vq import VQConfig, VQTokenizer


def matches(meta: dict) -> bool:
    return meta["config"].get("cls") == "LlamaGen tokenizer.tokenizer_image.vq_model.VQModel"


def filled(golden: Golden) -> VQTokenizer:
    """The golden's model with its weights; arguments that the json leaves out have the official defaults."""
    arguments = golden.meta["config"]["ModelArgs"]
    multipliers = tuple(arguments.get("encoder_ch_mult", (1, 1, 2, 2, 4)))
    assert tuple(arguments.get("decoder_ch_mult", multipliers)) == multipliers, "one set of multipliers for both halves"
    config = VQConfig(
        image_size=golden.shape("rec")[-1], vocab_size=arguments.get("codebook_size", 16384),
        code_dim=arguments.get("codebook_embed_dim", 8), base_channels=golden.meta["config"].get("ch", 128),
        channel_multipliers=multipliers, num_res_blocks=2, latent_channels=arguments.get("z_channels", 256),
        l2_normalize=arguments.get("codebook_l2_norm", True),
    )  # fmt: skip
    return fill(VQTokenizer(config).eval(), golden.meta["codebook_keys"])


@torch.inference_mode()
def run(golden: Golden) -> None:
    tokenizer, images = filled(golden), golden.image("image")
    keys, shape = set(golden.meta["arrays"]), golden.shape("quant")

    def as_map(codes: torch.Tensor) -> torch.Tensor:
        """(B, N, C) as the official (B, C, h, w)."""
        return codes.transpose(1, 2).reshape(shape)

    golden.compare("pre_quant", tokenizer.quant_conv(tokenizer.encoder(images)))
    found = re.search(r"index_margin\s*>\s*([\d.e-]+)", golden.meta["tolerance"]["indices"])
    assert found, f"{golden.name}: no margin in {golden.meta['tolerance']['indices']!r}"
    tokens = tokenizer.encode(images)
    golden.compare_indices("indices", tokens, "index_margin", float(found[1]))
    distances = quantizer.squared_distances(tokenizer.vectors(images), tokenizer.codebook).view(*tokens.shape, -1)
    best = distances.topk(2, largest=False).values
    golden.compare("index_margin", best[..., 1] - best[..., 0])
    golden_tokens = golden.tensor("indices").view(tokens.shape)
    golden.compare("quant", as_map(tokenizer.embed(golden_tokens)))
    golden.compare("rec", tokenizer.decode(golden_tokens))
    given = golden.make_tokens(tuple(tokens.shape), tokenizer.vocab_size)
    golden.compare("decode_code", tokenizer.decode(given))
    if "tokens" in keys:
        golden.compare("tokens", given)
    if "codebook_entry" in keys:
        golden.compare("codebook_entry", as_map(tokenizer.embed(given)))
    if "forward_rec" in keys:
        golden.compare("forward_rec", tokenizer(images).reconstruction)
    if "train_losses" in keys:
        compare_losses(golden, tokenizer, images)


def compare_losses(golden: Golden, tokenizer: VQTokenizer, images: torch.Tensor) -> None:
    """Codebook and commitment terms; the third entry is LlamaGen's entropy term, which we do not have."""
    output = tokenizer(images)
    beta = golden.meta["config"]["ModelArgs"].get("commit_loss_beta", 0.25)
    codebook = quantizer.codebook_loss(output.vectors, output.codes)
    commitment = beta * quantizer.commitment_loss(output.vectors, output.codes)
    ours = [float(codebook), float(commitment)]
    # The losses are far below 1, where the golden's tolerance would be absolute.
    np.testing.assert_allclose(ours, golden.arrays["train_losses"][:2], rtol=1e-4)
    golden.compare("train_losses", np.array([*ours, golden.arrays["train_losses"][2]]))
    golden.skip("train_losses[2]", "LlamaGen's entropy term; our objective has none")
