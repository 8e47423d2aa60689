"""What a Janus generator is made of: transformers' modules, and the tables that go with them as plain functions.

transformers is imported when a generator is built, not before: it is an optional package and slow to import.

Letters: `B` batch, `T` positions read so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from consonar.errors import UserError
from consonar.generators.cache import KVCache

if TYPE_CHECKING:
    from consonar.generators.janus import JanusConfig


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


def visible(valid: Tensor, start: int) -> Tensor:
    """What each query of `start` .. T - 1 sees: (B, 1, T - start, T) bool <- `valid` (B, T) bool, False at padding.

    Padding sees itself, or its softmax would be over nothing.
    """
    places = torch.arange(valid.shape[1], device=valid.device)
    queries = places[start:, None]
    return ((places <= queries) & valid[:, None, None]) | (places == queries)


@dataclass(frozen=True)
class CacheLayers:
    """A `KVCache` as transformers' attention addresses it."""

    cache: KVCache

    def update(self, keys: Tensor, values: Tensor, layer: int, _: Any = None) -> tuple[Tensor, Tensor]:
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
        num_key_value_heads=config.num_kv_heads or config.num_heads,
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
