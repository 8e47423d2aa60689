"""Goldens of 1d-tokenizer's `TiTok`: both published forms, at any size."""

from functools import cache

import torch
from fill import fill
from golden import Golden

from consonar.tokenizers import quantizer
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vit import TransformerConfig, ViTTokenizer
from consonar.tokenizers.vqgan import MaskGITConfig

PUBLISHED_SIZES = {
    "small": {"width": 512, "layers": 8, "heads": 8},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
}


def matches(meta: dict) -> bool:
    return "titok.TiTok" in meta["config"].get("cls", "")


def configuration(settings: dict, image_size: int, sizes: dict) -> TiTokConfig:
    """Ours for an official `vq_model` table."""

    def side(which: str) -> TransformerConfig:
        size = sizes[settings[f"vit_{which}_model_size"]]
        return TransformerConfig(
            width=size["width"], num_layers=size["layers"], num_heads=size["heads"],
            patch_size=settings[f"vit_{which}_patch_size"],
        )  # fmt: skip

    pixel_decoder = None
    if settings.get("is_legacy", True):
        # Before its pixel decoder is added, the official model stops at the logits: any decoder of that factor will do.
        levels = settings["vit_dec_patch_size"].bit_length()
        finetuned = settings.get("finetune_decoder", True)
        shape = {} if finetuned else {"base_channels": 32, "channel_multipliers": (1,) * levels}
        pixel_decoder = MaskGITConfig(image_size=image_size, **shape)
    return TiTokConfig(
        image_size=image_size, vocab_size=settings["codebook_size"], code_dim=settings["token_size"],
        num_tokens=settings["num_latent_tokens"], encoder=side("enc"), decoder=side("dec"),
        l2_normalize=settings["use_l2_norm"], pixel_decoder=pixel_decoder,
    )  # fmt: skip


@cache
def build(config: TiTokConfig, codebook_keys: tuple[str, ...]) -> TiTokTokenizer:
    return fill(TiTokTokenizer(config).eval(), codebook_keys)


@torch.inference_mode()
def run(golden: Golden) -> None:
    official = golden.meta["config"]["cfg"]
    settings, image_size = official["model"]["vq_model"], official["dataset"]["preprocessing"]["crop_size"]
    config = configuration(settings, image_size, PUBLISHED_SIZES | golden.meta["config"].get("size_table", {}))
    model = build(config, tuple(golden.meta["codebook_keys"]))
    compare_search(golden, model)
    tokens = golden.make_tokens(golden.shape("tokens"), model.vocab_size)
    golden.compare("tokens", tokens)
    golden.compare("decoder_vit", model.decoder(model.embed(tokens)))
    if config.pixel_decoder is not None and not settings.get("finetune_decoder", True):
        golden.compare("decode_tokens", model.decoder(model.embed(tokens)))
        golden.compare("rec", model.decoder(model.embed(golden_tokens(golden))))
    else:
        golden.compare("decode_tokens", (model.decode(tokens) + 1) / 2)
        golden.compare("rec", (model.decode(golden_tokens(golden)) + 1) / 2)


def golden_tokens(golden: Golden) -> torch.Tensor:
    """(B, N): the official tokens of the golden's images."""
    batch, _, _, num_tokens = golden.shape("z")
    return golden.tensor("indices").view(batch, num_tokens)


def compare_search(golden: Golden, model: ViTTokenizer) -> None:
    """From the image to the codes; for AliTok too."""
    images = 2 * golden.image("image") - 1
    latents = model.encoder((images + 1) / 2, model.latent_tokens)  # (B, N, C)
    golden.compare("z", as_official(latents))
    margin = float(golden.meta["tolerance"]["indices"].rpartition(">")[2])
    golden.compare_indices("indices", model.encode(images), "index_margin", margin)
    distances = quantizer.squared_distances(model.vectors(images), model.codebook)  # (B*N, V)
    best = distances.topk(2, largest=False).values.view(*latents.shape[:2], 2)
    golden.compare("index_margin", best[..., 1] - best[..., 0])
    golden.compare("quant", as_official(model.embed(golden_tokens(golden))))


def as_official(codes: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, N) <- (B, N, C)."""
    return codes.transpose(1, 2).unsqueeze(2)
