"""Released state dicts of every architecture at tiny size, for the tests of conversion."""

from pathlib import Path

import safetensors.torch
import torch

from consonar.convert.layouts import generators, janus, tokenizers
from consonar.generators import GENERATORS
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vq import VQConfig
from consonar.tokenizers.vqgan import MaskGITConfig, VQGANPlusConfig
from consonar.types import Grid

CONV = {"vocab_size": 16, "code_dim": 4, "base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1}
DEEP = CONV | {"channel_multipliers": (1, 1, 1, 1, 1)}
SIDE = TransformerConfig(width=64, num_layers=1, num_heads=1, patch_size=16)
VIT = {"image_size": 32, "vocab_size": 16, "code_dim": 4, "encoder": SIDE, "decoder": SIDE}
ROTARY = {"width": 64, "num_layers": 2, "vocab_size": 16}
VQ = VQConfig(image_size=256, latent_channels=8, **CONV)
LLAMAGEN = LlamaGenConfig(**ROTARY, num_heads=1, num_tokens=256, num_classes=3, grid=Grid(16, 16))
JANUS = JanusConfig(
    width=128, num_layers=2, num_heads=1, mlp_width=48, text_vocab_size=100003, code_dim=4, head_width=24,
    vocab_size=16, num_tokens=576,
)  # fmt: skip
USED = {tokenizers.CODE_USAGE: torch.arange(9.0)}
HEADS = {key: torch.randn(3, generator=seeded(0, key)) for head in generators.HEADS for key in sorted(head)}
REAR = ReARConfig(width=32, num_layers=2, num_heads=4, vocab_size=16, num_tokens=4, num_classes=3)
KV_CACHE = {"layers.1.attention.kv_cache.k_cache": torch.zeros(2, 1, 5, 64)}
# Record, our configuration, and what the released file holds besides.
CASES = {
    "vq": (tokenizers.LLAMAGEN, VQ, USED),
    "maskgit": (tokenizers.MASKGIT, MaskGITConfig(**CONV), {}),
    "vqgan+": (tokenizers.VQGAN_PLUS, VQGANPlusConfig(**CONV), {}),
    "maskbit": (tokenizers.VQGAN_PLUS, VQGANPlusConfig(**CONV, quantizer="lookup-free"), {}),
    "titok, proxy codes": (
        tokenizers.TITOK, TiTokConfig(**VIT, num_tokens=3, pixel_decoder=MaskGITConfig(image_size=32, **DEEP)), {}
    ),
    "titok, pixels": (
        tokenizers.TITOK, TiTokConfig(**VIT, num_tokens=3, pixel_decoder=None, l2_normalize=False), {}
    ),
    "alitok": (tokenizers.ALITOK, AliTokConfig(**VIT), {}),
    "rear": (generators.REAR, REAR, HEADS),
    "rar": (generators.REAR, REAR, {}),
    "llamagen, classes": (generators.LLAMAGEN, LLAMAGEN, {}),
    "llamagen, captions, sampled from": (
        generators.LLAMAGEN,
        LlamaGenConfig(**ROTARY, num_heads=1, num_tokens=256, condition="text", num_condition_tokens=4, caption_dim=6,
                       grid=Grid(16, 16)),
        KV_CACHE,
    ),
    "alitok-ar": (
        generators.ALITOK,
        AliTokARConfig(**ROTARY, num_heads=4, num_tokens=273, num_classes=3, grid=Grid(16, 16, prefix=17)), {},
    ),
    "janus": (janus.OFFICIALS[0], JANUS, {"language_model.lm_head.weight": torch.ones(2), "aligner.a": torch.ones(1)}),
    "janus, transformers": (janus.OFFICIALS[1], JANUS, {"lm_head.weight": torch.ones(2)}),
    "janus vq": (janus.OFFICIALS[2], VQ, USED),
    "janus vq, transformers": (janus.OFFICIALS[3], VQ, {}),
}  # fmt: skip


def module_of(config):
    kinds = TOKENIZERS if config.kind in TOKENIZERS else GENERATORS
    return kinds[config.kind][1](config)


def released(name: str) -> dict[str, torch.Tensor]:
    """A released state dict of tiny size, every value drawn."""
    record, config, unused = CASES[name]
    rng = seeded(0, name)
    ours = {key: torch.randn(value.shape, generator=rng) for key, value in module_of(config).state_dict().items()}
    return record.to_official(ours, unused, config)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
