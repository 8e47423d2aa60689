"""MaskGIT-VQGAN against 1d-tokenizer's classes: goldens of `PretrainedTokenizer` and of its parts assembled alike."""

import re

import torch
from fill import fill
from golden import Golden

from consonar.tokenizers import quantizer
from consonar.tokenizers.vqgan import ConvTokenizer, MaskGITConfig, MaskGITTokenizer


def matches(meta: dict) -> bool:
    return "PretrainedTokenizer" in meta["config"]["cls"]


def config_of(golden: Golden) -> MaskGITConfig:
    """From the json; a golden without `conf` is of the published size, apart from the image."""
    side = golden.image("image").shape[-1]
    conf = golden.meta["config"].get("conf")
    if conf is None:
        return MaskGITConfig(image_size=side)
    assert conf["num_channels"] == 3 and conf["num_resolutions"] == len(conf["channel_mult"]), conf
    return MaskGITConfig(
        image_size=side,
        vocab_size=golden.meta["config"].get("num_embeddings", 1024),
        code_dim=conf["z_channels"],
        base_channels=conf["hidden_channels"],
        channel_multipliers=tuple(conf["channel_mult"]),
        num_res_blocks=conf["num_res_blocks"],
    )


def as_map(codes: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """(B, N, C) as the official (B, C, h, w)."""
    return codes.transpose(1, 2).reshape(shape)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def compare_search(golden: Golden, tokenizer: ConvTokenizer, images: torch.Tensor) -> None:
    """Tokens of `images` (ours, [-1, 1]), and how much farther the second nearest code is."""
    tokens, shape = tokenizer.encode(images), golden.shape("indices")
    if "index_margin" not in golden.meta["arrays"]:
        golden.compare("indices", tokens.view(shape))
        return
    threshold = re.search(r"index_margin\s*>\s*([\d.e-]+)", golden.meta["tolerance"]["indices"])
    assert threshold, f"{golden.name}: no margin in {golden.meta['tolerance']['indices']!r}"
    golden.compare_indices("indices", tokens, "index_margin", float(threshold[1]))
    distances = quantizer.squared_distances(tokenizer.vectors(images), tokenizer.codebook)
    nearest = distances.topk(2, largest=False).values
    golden.compare("index_margin", (nearest[:, 1] - nearest[:, 0]).view(golden.shape("index_margin")))


def compare_all(golden: Golden, ours: dict[str, torch.Tensor]) -> None:
    """Those of our arrays that the golden has."""
    for key in ours.keys() & golden.meta["arrays"].keys():
        golden.compare(key, ours[key])


@torch.inference_mode()
def run(golden: Golden) -> None:
    tokenizer = fill(MaskGITTokenizer(config_of(golden)).eval(), golden.meta["codebook_keys"])
    images, found = 2 * golden.image("image") - 1, golden.tensor("indices").flatten(1)
    compare_search(golden, tokenizer, images)
    tokens = golden.make_tokens(golden.shape("tokens"), tokenizer.vocab_size)
    decoded = to_unit(tokenizer.decode(tokens))
    ours = {
        "pre_quant": tokenizer.encoder(to_unit(images)),
        "quant": as_map(tokenizer.embed(found), golden.shape("pre_quant")),
        "rec_raw": to_unit(tokenizer.decode(found)),
        "tokens": tokens,
        "code_states": tokenizer.embed(tokens),
        "decoder_raw": decoded,
        "decode": decoded.clamp(0, 1),
    }
    compare_all(golden, ours)
