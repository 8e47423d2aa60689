"""Released files of tokenizers: LlamaGen's VQ (arXiv 2406.06525; `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, `vq_ds16_t2i.pt`),
MaskGIT's (`maskgit-vqgan-imagenet-f16-256.bin`), VQGAN+ (MaskBit's `ConvVQModel`, reAR's `VQPlus`; arXiv 2409.16211),
TiTok (arXiv 2406.07550) and AliTok (arXiv 2506.05289; `AliTok.pth`). Our keys are theirs, but for LlamaGen's log of
code usage, a buffer, which is set aside.

What files do not tell, as published: 32 groups; of convolutional ones, images of 256 pixels (they read any multiple of
their reduction; `image_size` of `convert` says another); heads of the transformers; whether codes are normalised: those
of LlamaGen and of TiTok's first form are. VQGAN+'s constant tables of the lookup-free quantiser are set aside, and
written anew on the way back. Not read: MaskBit's copy of MaskGIT's tokenizer, whose decoder is stored the other way
round.
"""

import math

import torch

from consonar.convert.layouts import official
from consonar.convert.layouts.official import Official, Shapes, State, has, multipliers, num_indices
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vq import VQConfig
from consonar.tokenizers.vqgan import MaskGITConfig, VQGANPlusConfig, sign_codes

CODEBOOK, TABLE, WEIGHTS = "quantize.embedding.weight", "quantize.codebook", "quantize.bits_to_indices"
CODE_USAGE = "quantize.codebook_used"


def llamagen_config(shapes: Shapes) -> VQConfig:
    base = shapes["encoder.conv_in.weight"][0]
    vocab_size, code_dim = shapes[CODEBOOK]
    return VQConfig(
        image_size=256,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base,
        channel_multipliers=multipliers(shapes, "encoder.conv_blocks.", "res.0.conv1.weight", base),
        num_res_blocks=num_indices(shapes, "encoder.conv_blocks.0.res."),
        latent_channels=shapes["encoder.conv_out.weight"][0],
    )


def maskgit_config(shapes: Shapes) -> MaskGITConfig:
    base_channels = shapes["encoder.conv_in.weight"][0]
    vocab_size, code_dim = shapes[CODEBOOK]
    return MaskGITConfig(
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=multipliers(shapes, "encoder.down.", "block.0.conv2.weight", base_channels),
        num_res_blocks=num_indices(shapes, "encoder.mid."),
    )


def is_vqgan_plus(shapes: Shapes) -> bool:
    """With the decoder in the order of execution, so that its last level does not enlarge."""
    parts = (f"{part}.res_blocks.0.conv1.weight" for part in ("encoder.down.0", "encoder.mid", "decoder.up.0"))
    last = num_indices(shapes, "decoder.up.") - 1
    in_order = has(*parts, without=(f"decoder.up.{last}.upsample_conv.weight",))
    return in_order(shapes) and (CODEBOOK in shapes or WEIGHTS in shapes)


def vqgan_plus_config(shapes: Shapes) -> VQGANPlusConfig:
    base_channels, levels = shapes["encoder.conv_in.weight"][0], num_indices(shapes, "encoder.down.")
    code_dim = shapes["encoder.conv_out.weight"][0]
    blocks, decoder_blocks = (num_indices(shapes, f"{part}.mid.res_blocks.") for part in ("encoder", "decoder"))
    return VQGANPlusConfig(
        vocab_size=shapes[CODEBOOK][0] if CODEBOOK in shapes else 2**code_dim,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=multipliers(shapes, "encoder.down.", "res_blocks.0.conv2.weight", base_channels),
        num_res_blocks=blocks,
        num_decoder_blocks=None if decoder_blocks == blocks else decoder_blocks,
        quantizer="lookup" if CODEBOOK in shapes else "lookup-free",
        downsample="average" if levels > 1 and "encoder.down.0.down_conv.weight" not in shapes else "convolution",
    )


def vqgan_plus_to_official(ours: State, unused: State, config: VQGANPlusConfig) -> State:
    tables: State = {}
    if config.quantizer == "lookup-free":  # a tokenizer that was not converted has no `unused`
        bits = torch.arange(config.code_dim)
        tables = {WEIGHTS: (2**bits).int(), TABLE: sign_codes(torch.arange(config.vocab_size), config.code_dim)}
    return {**ours, **tables, **unused}


def pixel_decoder_config(shapes: Shapes, image_size: int) -> MaskGITConfig:
    """The convolutional part of TiTok's first form: a decoder and its codes, without an encoder."""
    base_channels = shapes["pixel_decoder.up.0.block.0.conv1.weight"][0]
    vocab_size, code_dim = shapes["pixel_quantize.embedding.weight"]
    return MaskGITConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        base_channels=base_channels,
        channel_multipliers=multipliers(shapes, "pixel_decoder.up.", "block.0.conv1.weight", base_channels),
        num_res_blocks=num_indices(shapes, "pixel_decoder.mid."),
    )


def titok_config(shapes: Shapes) -> TiTokConfig:
    num_patches = {side: shapes[f"{side}.positional_embedding"][0] - 1 for side in ("encoder", "decoder")}
    image_size = math.isqrt(num_patches["encoder"]) * shapes["encoder.patch_embed.weight"][-1]
    first_form = "pixel_quantize.embedding.weight" in shapes
    vocab_size, code_dim = shapes[CODEBOOK]
    return TiTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_tokens=shapes["latent_tokens"][0],
        encoder=official.transformer(shapes, "encoder", image_size, num_patches["encoder"]),
        decoder=official.transformer(shapes, "decoder", image_size, num_patches["decoder"]),
        l2_normalize=first_form,
        pixel_decoder=pixel_decoder_config(shapes, image_size) if first_form else None,
    )


def alitok_config(shapes: Shapes) -> AliTokConfig:
    num_encoder_patches = shapes["encoder.positional_embedding"][0]
    image_size = math.isqrt(num_encoder_patches) * shapes["encoder.patch_embed.weight"][-1]
    decoder_patch_size = math.isqrt(shapes["decoder.ffn.0.weight"][0] // 3)
    num_decoder_patches = (image_size // decoder_patch_size) ** 2
    vocab_size, code_dim = shapes[CODEBOOK]
    return AliTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_prefix_tokens=shapes["latent_tokens"][0] - num_decoder_patches,
        num_buffer_tokens=shapes["decoder.class_embedding"][0],
        encoder=official.transformer(shapes, "encoder", image_size, num_encoder_patches),
        decoder=official.transformer(shapes, "decoder", image_size, num_decoder_patches),
    )


LLAMAGEN = Official(
    "LlamaGen VQ tokenizer",
    "tokenizer",
    has("encoder.conv_blocks.0.res.0.norm1.weight", CODEBOOK, "quant_conv.weight",
        "post_quant_conv.weight"),
    llamagen_config,
    official.set_aside(lambda key: key == CODE_USAGE),
)  # fmt: skip
# VQGAN of taming-transformers shares the names of the levels, but not those of the middle.
MASKGIT = Official(
    "MaskGIT-VQGAN tokenizer",
    "tokenizer",
    has("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight", "decoder.up.0.block.0.conv1.weight",
        CODEBOOK),
    maskgit_config,
)  # fmt: skip
VQGAN_PLUS = Official(
    "VQGAN+ tokenizer",
    "tokenizer",
    is_vqgan_plus,
    vqgan_plus_config,
    official.set_aside(lambda key: key in (TABLE, WEIGHTS)),
    vqgan_plus_to_official,
)
# With a codebook, and without the text of TA-TiTok.
TITOK = Official(
    "TiTok tokenizer",
    "tokenizer",
    has("latent_tokens", "encoder.class_embedding", "decoder.mask_token", CODEBOOK,
        without=("decoder.text_guidance",)),
    titok_config,
)  # fmt: skip
# Learned latents, and an encoder without a class token or TiTok's mask token.
ALITOK = Official(
    "AliTok tokenizer",
    "tokenizer",
    has(
        "latent_tokens", "decoder.class_embedding", "encoder.patch_embed.weight", CODEBOOK,
        without=("encoder.class_embedding", "decoder.mask_token"),
    ),
    alitok_config,
)  # fmt: skip
