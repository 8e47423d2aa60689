"""VQGAN+ against reAR's `VQPlus` (MaskBit's `ConvVQModel`), with a codebook or lookup-free."""

import torch
from fill import fill
from golden import Golden
from golden_maskgit import as_map, compare_all, compare_search, to_unit

from consonar.tokenizers import quantizer
from consonar.tokenizers.vqgan import VQGANPlusConfig, VQGANPlusTokenizer


def matches(meta: dict) -> bool:
    return "VQPlus" in meta["config"]["cls"]


def config_of(golden: Golden) -> VQGANPlusConfig:
    cfg = golden.meta["config"]["cfg"]
    assert cfg["num_channels"] == 3 and cfg["num_resolutions"] == len(cfg["channel_mult"]), cfg
    lookup_free = cfg["quantizer_type"] == "lookup-free"
    return VQGANPlusConfig(
        image_size=golden.image("image").shape[-1],
        # MaskBit's configurations state any codebook size beside lookup-free codes; their width says it.
        vocab_size=2 ** cfg["token_size"] if lookup_free else cfg["codebook_size"],
        code_dim=cfg["token_size"],
        base_channels=cfg["hidden_channels"],
        channel_multipliers=tuple(cfg["channel_mult"]),
        num_res_blocks=cfg["num_res_blocks"],
        num_decoder_blocks=cfg.get("num_res_blocks_decoder"),
        quantizer=cfg["quantizer_type"],
        l2_normalize=not lookup_free and cfg.get("use_l2_normalisation", False),
        downsample="convolution" if cfg["sample_with_conv"] else "average",
    )


@torch.inference_mode()
def run(golden: Golden) -> None:
    tokenizer = fill(VQGANPlusTokenizer(config_of(golden)).eval(), golden.meta["codebook_keys"])
    images, found = 2 * golden.image("image") - 1, golden.tensor("indices").flatten(1)
    compare_search(golden, tokenizer, images)
    tokens = golden.make_tokens(golden.shape("tokens"), tokenizer.vocab_size)
    output = tokenizer(images)
    commitment = golden.meta["config"]["cfg"]["commitment_cost"] * quantizer.commitment_loss(
        output.vectors, output.codes
    )
    # Lookup-free codes are constants: there is nothing to move.
    codebook = torch.zeros(()) if tokenizer.lookup_free else quantizer.codebook_loss(output.vectors, output.codes)
    ours = {
        "z": tokenizer.encoder(to_unit(images)),
        "quant": as_map(tokenizer.embed(found), golden.shape("z")),
        "rec": to_unit(tokenizer.decode(found)),
        "losses": torch.stack([commitment, codebook, commitment + codebook]),
        "tokens": tokens,
        "decode_tokens": to_unit(tokenizer.decode(tokens)),
    }
    compare_all(golden, ours)
