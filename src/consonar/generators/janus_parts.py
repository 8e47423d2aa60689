"""What a Janus generator is made of: its shape, transformers' modules, and the tables of these as plain functions.

transformers is imported when a generator is built, not before: it is an optional package and slow to import.

Letters: `B` batch, `T` positions read so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from consonar.attention import KVCache
from consonar.errors import UserError
from consonar.generators.base import CausalConfig
from consonar.options import SMALLEST, Count, CountOrZero, Divides, Positive, Range

# "<｜▁pad▁｜>" of the tokenizer of both released models.
PAD_TOKEN = 100002


@dataclass(frozen=True, kw_only=True)
class JanusConfig(CausalConfig):
    """Shape of a Janus generator; the defaults are Janus-Pro-1B. Recipes leave `vocab_size`, `num_tokens` at 0."""

    kind: Literal["janus"] = "janus"
    width: Count = 2048
    """Hidden size of the language model."""
    num_layers: Count = 24
    """Transformer blocks."""
    num_heads: Annotated[Count, Divides("width", 2, into="heads of even width")] = 16
    """Attention heads; divides `width`."""
    num_kv_heads: Annotated[CountOrZero, Divides("num_heads")] = 0
    """Heads of keys and values; divides `num_heads`; 0: as many."""
    mlp_width: Count = 5632
    """Hidden units of the gated MLP."""
    rope_base: Annotated[float, Range(SMALLEST, 1e12)] = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Positive = 1e-6
    """Epsilon of every RMSNorm."""
    text_vocab_size: Count = 102400
    """Tokens of the language model's text vocabulary."""
    pad_token: CountOrZero = PAD_TOKEN
    """Text token that pads prompts and stands for every word of the null prompt."""
    max_prompt_tokens: Annotated[int, Range(2, note="a prompt has a first and a start-of-image token")] = 256
    """Longest prompt, with the begin-of-sentence and the start-of-image token."""
    code_dim: Count = 8
    """Width of the generator's own embedding of a code."""
    head_width: CountOrZero = 0
    """Hidden units of the generation head; 0: as many as `width`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token >= self.text_vocab_size:
            raise UserError(
                f"model.pad_token: {self.pad_token} is not a text token; choices: 0..{self.text_vocab_size - 1} "
                f"(model.text_vocab_size {self.text_vocab_size})"
            )

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.max_prompt_tokens

    @property
    def num_key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@lru_cache(maxsize=16)
def inverse_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """base^(-2 i / head_dim): (head_dim / 2,) float32."""
    # A table made while sampling serves training too, where autograd refuses tensors of inference mode.
    with torch.inference_mode(False):
        return (1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)).to(device)


def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, head_dim) float32 for positions (B, T); halves, not neighbours, are the rotary pairs."""
    angles = positions[..., None].float() * inverse_frequencies(head_dim, base, positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class CacheLayers:
    """A `KVCache` as transformers' attention addresses it."""

    cache: KVCache

    def update(self, keys: Tensor, values: Tensor, layer: int, _: object = None) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer, keys, values)


def build_parts(config: JanusConfig) -> dict[str, nn.Module]:
    """transformers' modules under the names that they have in its `JanusModel`, on the meta device."""
    try:
        from transformers import JanusVQVAEConfig, LlamaConfig, LlamaModel
        from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
    except ImportError as error:
        raise UserError(
            f"model.kind: 'janus' needs transformers ({error}); install the extra: pip install 'consonar[text]'"
        ) from error
    language = LlamaConfig(
        vocab_size=config.text_vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_heads,
        rms_norm_eps=config.norm_eps,
        # With a padding index the embedding that fills the null prompt would get no gradient.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    aligner = JanusVQVAEConfig(embed_dim=config.code_dim, projection_dim=config.width, num_hidden_layers=2)
    head = JanusVQVAEConfig(
        image_token_embed_dim=config.width,
        projection_dim=config.head_width or config.width,
        num_embeddings=config.vocab_size,
    )
    # On the meta device, because transformers draws weights of its own from the global random state.
    with torch.device("meta"):
        language_model = LlamaModel(language)
        # Holds a table as a buffer, which `assign=True` would leave on the meta device; `rotary` makes it instead.
        del language_model.rotary_emb
        return {
            "language_model": language_model,
            "generation_embeddings": nn.Embedding(config.vocab_size, config.code_dim),
            "generation_aligner": JanusVQVAEAlignerMLP(aligner),
            "generation_head": JanusVQVAEHead(head),
        }
