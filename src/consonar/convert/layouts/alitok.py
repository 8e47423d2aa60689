"""Released files of AliTok (arXiv 2506.05289), the tokenizer `AliTok.pth` and the generators: our keys are theirs."""

import math

from consonar.convert.layouts.official import Official, Shapes, has, num_indices, transformer
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.rotary import swiglu_width
from consonar.tokenizers.alitok import AliTokConfig
from consonar.types import Grid


def tokenizer_config(shapes: Shapes) -> AliTokConfig:
    """All sizes from the file; heads as published."""
    num_encoder_patches = shapes["encoder.positional_embedding"][0]
    image_size = math.isqrt(num_encoder_patches) * shapes["encoder.patch_embed.weight"][-1]
    decoder_patch_size = math.isqrt(shapes["decoder.ffn.0.weight"][0] // 3)
    num_decoder_patches = (image_size // decoder_patch_size) ** 2
    vocab_size, code_dim = shapes["quantize.embedding.weight"]
    return AliTokConfig(
        image_size=image_size,
        vocab_size=vocab_size,
        code_dim=code_dim,
        num_prefix_tokens=shapes["latent_tokens"][0] - num_decoder_patches,
        num_buffer_tokens=shapes["decoder.class_embedding"][0],
        encoder=transformer(shapes, "encoder", image_size, num_encoder_patches),
        decoder=transformer(shapes, "decoder", image_size, num_decoder_patches),
    )


def generator_config(shapes: Shapes) -> AliTokARConfig:
    """From the shapes, which do not tell where the tokens sit: 17 and 16 x 16, as published. Codes and classes share a
    table; the rows of the output say how many are codes."""
    vocab_size, width = shapes["output.weight"]
    hidden = shapes["blocks.0.mlp.w1.weight"][0]
    return AliTokARConfig(
        width=width,
        num_layers=num_indices(shapes, "blocks."),
        num_heads=width // shapes["blocks.0.attn.q_norm.weight"][0],
        ffn_width=0 if hidden == swiglu_width(width, 256) else hidden,
        vocab_size=vocab_size,
        num_tokens=273,
        num_classes=shapes["embeddings.weight"][0] - vocab_size - 2,
        grid=Grid(16, 16, prefix=17),
    )


# Learned latents, and an encoder without a class token or TiTok's mask token.
TOKENIZER = Official(
    "AliTok tokenizer",
    "tokenizer",
    has(
        "latent_tokens", "decoder.class_embedding", "encoder.patch_embed.weight", "quantize.embedding.weight",
        without=("encoder.class_embedding", "decoder.mask_token"),
    ),
    tokenizer_config,
)  # fmt: skip
# Llama-style blocks under reAR's names, without AdaLN.
GENERATOR = Official(
    "AliTok generator",
    "generator",
    has("embeddings.weight", "output.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"),
    generator_config,
)
