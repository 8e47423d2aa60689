"""A Janus of the smallest size in the released layouts, with a tokenizer.json of the package tokenizers."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from consonar.convert.layouts import janus as files
from consonar.networks.prompts import ASSISTANT, BEGIN, IMAGE_START, PAD, USER
from consonar.seeding import generator as seeded

AUTHORS, TRANSFORMERS, AUTHORS_VQ, TRANSFORMERS_VQ = files.OFFICIALS


@torch.no_grad()
def drawn(module, seed=0):
    """`module` with weights that switch no path off."""
    rng = seeded(seed, "janus")
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 and not name.endswith("bias") else 0.2 * noise)
    return module.eval()


def whole_janus(vocab_size: int = 20, pad: int = 1, begin: int = 2):
    """transformers' whole Janus, tiny, with heads 128 wide as in the released ones."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2,
        "projection_dim": 256, "num_image_tokens": 16, "mlp_ratio": 2.0,
    }  # fmt: skip
    vq = {
        "embed_dim": 8, "num_embeddings": 40, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "projection_dim": 256, "image_token_embed_dim": 256,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 256, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "pad_token_id": pad, "bos_token_id": begin, "eos_token_id": 4,
    }  # fmt: skip
    config = transformers.JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=19, tie_word_embeddings=False
    )
    return drawn(transformers.JanusForConditionalGeneration(config))


def authors_file(whole):
    """The same weights as the authors' file would name them, with what transformers' conversion drops."""
    parts = files.split_parts(whole.state_dict())
    ours, unused = TRANSFORMERS.to_ours(parts["generator"], None)
    renamed = {
        "lm_head.weight": "language_model.lm_head.weight",
        **{key: key.removeprefix("model.") for key in unused if key.startswith("model.")},
    }
    assert set(renamed) == set(unused)
    unused = {renamed[key]: value for key, value in unused.items()}
    vq, _ = TRANSFORMERS_VQ.to_ours(parts["tokenizer"], None)
    usage = {"quantize.codebook_used": torch.arange(9.0)}
    return AUTHORS.to_official(ours, unused, None) | AUTHORS_VQ.to_official(vq, usage, None)


def byte_words(*special: str) -> Tokenizer:
    """A token for every byte, and the special ones; cuts, pads and begins in its own way, which prompts must not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.add_special_tokens(list(special))
    words.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], words.token_to_id(special[0]))]
    )
    words.enable_truncation(8)
    words.enable_padding(length=12)
    return words


WORDS = (BEGIN, PAD, USER, ASSISTANT, IMAGE_START)


def save_released_janus(folder: Path, layout: str, words: Tokenizer | None = None) -> None:
    """A folder as the authors or transformers publish it; "authors" or "transformers"."""
    folder.mkdir(parents=True)
    words = byte_words(*WORDS) if words is None else words
    whole = whole_janus(vocab_size=270, pad=words.token_to_id(PAD), begin=words.token_to_id(BEGIN))
    if layout == "authors":
        torch.save(authors_file(whole), folder / "pytorch_model.bin")
    else:
        save_file({key: value.clone() for key, value in whole.state_dict().items()}, folder / "model.safetensors")
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
