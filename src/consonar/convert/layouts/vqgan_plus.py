"""Released files of VQGAN+ (MaskBit's `ConvVQModel`, reAR's `VQPlus`; arXiv 2409.16211): our keys are theirs.

The constant tables of the lookup-free quantiser are set aside, and written anew on the way back. Files do not tell the
image size, the number of groups and whether codes are normalised: 256, 32 and not, as published. Not read: MaskBit's
copy of MaskGIT's tokenizer, whose decoder is stored the other way round.
"""

import torch

from consonar.convert.layouts.official import Official, Shapes, State, has, multipliers, num_indices, set_aside
from consonar.tokenizers.vqgan_plus import VQGANPlusConfig, sign_codes

CODEBOOK, TABLE, WEIGHTS = "quantize.embedding.weight", "quantize.codebook", "quantize.bits_to_indices"


def recognises(shapes: Shapes) -> bool:
    """VQGAN+ with the decoder in the order of execution, so that its last level does not enlarge."""
    parts = (f"{part}.res_blocks.0.conv1.weight" for part in ("encoder.down.0", "encoder.mid", "decoder.up.0"))
    last = num_indices(shapes, "decoder.up.") - 1
    in_order = has(*parts, without=(f"decoder.up.{last}.upsample_conv.weight",))
    return in_order(shapes) and (CODEBOOK in shapes or WEIGHTS in shapes)


def config_from_shapes(shapes: Shapes) -> VQGANPlusConfig:
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


def to_official(ours: State, unused: State, config: VQGANPlusConfig) -> State:
    tables: State = {}
    if config.quantizer == "lookup-free":  # a tokenizer that was not converted has no `unused`
        bits = torch.arange(config.code_dim)
        tables = {WEIGHTS: (2**bits).int(), TABLE: sign_codes(torch.arange(config.vocab_size), config.code_dim)}
    return {**ours, **tables, **unused}


OFFICIAL = Official(
    "VQGAN+ tokenizer",
    "tokenizer",
    recognises,
    config_from_shapes,
    set_aside(lambda key: key in (TABLE, WEIGHTS)),
    to_official,
)
