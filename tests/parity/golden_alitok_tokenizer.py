"""Goldens of AliTok's tokenizer, its constants rewritten to any size."""

import torch
from fill import fill
from golden import Golden
from golden_titok import compare_search, golden_tokens

from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.vit import TransformerConfig


def matches(meta: dict) -> bool:
    return "alitok.AliTok" in meta["config"].get("cls", "")


@torch.inference_mode()
def run(golden: Golden) -> None:
    official = golden.meta["config"]

    def side(which: str) -> TransformerConfig:
        size = official[which]
        return TransformerConfig(
            width=size["width"], num_layers=size["layers"], num_heads=size["heads"], patch_size=official["patch_size"]
        )

    config = AliTokConfig(
        image_size=official["image_size"], vocab_size=official["codebook"], code_dim=official["token_size"],
        num_prefix_tokens=official["aux_tokens"], num_buffer_tokens=official["decoder_class_tokens"],
        encoder=side("encoder"), decoder=side("decoder"),
    )  # fmt: skip
    model = fill(AliTokTokenizer(config).eval(), golden.meta["codebook_keys"])
    assert model.grid.rows == official["grid"]
    compare_search(golden, model)
    tokens = golden.make_tokens(golden.shape("tokens"), model.vocab_size)
    golden.compare("tokens", tokens)
    golden.compare("decode_tokens", (model.decode(tokens) + 1) / 2)
    golden.compare("rec", (model.decode(golden_tokens(golden)) + 1) / 2)
