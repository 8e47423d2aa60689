"""Image generation of Janus (arXiv 2410.13848) and Janus-Pro (arXiv 2501.17811): a Llama that reads a prompt, then
image tokens.

The network is transformers' own (extra `text`): the blocks of its `LlamaModel`, Janus' aligner and generation head;
keys are those of its `JanusModel`. Facts kept from the released code: image tokens enter as aligner(embedding of the
code), a table of its own, not the tokenizer's codebook; the head is Linear, exact GELU, Linear; the first image token
is predicted where the start-of-image token, the last of the prompt, is read; the null prompt has every token between
its first (begin of sentence) and its last (start of image) replaced by the padding token, which is then attended to
like any other; rotary positions, base 10000.

Deviations: prompts of one batch may differ in length. They are padded on the left, padding is masked, and positions
are counted without it, so that a row equals the same row alone. (The released sampler reads one prompt at a time.
VA-pi's trainer pads on the right and counts padding, and takes the logits of slot i where token i itself has been read;
here slot i comes from the position before.) There are no classes: the condition is a `PromptCondition`, which
`networks.prompts` makes of words, `num_classes` is 0, and token stores with or without classes fit. The understanding
half (vision encoder, its aligner, text head) is not built.

Letters: `B` batch, `L` prompt positions of a batch, `P` of the longest prompt allowed, `n` image tokens, `V` codes,
`D` width, `T` positions read so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import KVCache, attention_mask
from consonar.errors import UserError, needs
from consonar.float32 import product_in_float32
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.generators.rotary import rotary_angles
from consonar.options import SMALLEST, Count, CountOrZero, Depth, Divides, Positive, Range
from consonar.types import PromptCondition

# "<｜▁pad▁｜>" of the tokenizer of both released models.
PAD_TOKEN = 100002


@dataclass(frozen=True, kw_only=True)
class JanusConfig(GeneratorConfig):
    """Shape of a Janus generator; the defaults are Janus-Pro-1B. Recipes leave `vocab_size`, `num_tokens` at 0."""

    kind: Literal["janus"] = "janus"
    width: Count = 2048
    """Hidden size of the language model."""
    num_layers: Depth = 24
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
        return self.max_prompt_tokens

    @property
    def num_key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


JANUS_PRESETS = {
    "1B": JanusConfig(),
    "7B": JanusConfig(width=4096, num_layers=30, num_heads=32, mlp_width=11008),
}


def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, head_dim) float32 for positions (T,); halves, not neighbours, are the rotary pairs."""
    angles = rotary_angles(positions, head_dim // 2, base).repeat(1, 2)
    return angles.cos(), angles.sin()


def build_parts(config: JanusConfig) -> dict[str, nn.Module]:
    """transformers' modules under the names that they have in its `JanusModel`, on the meta device."""
    with needs("model.kind: 'janus'", "text"):
        from transformers import JanusVQVAEConfig, LlamaConfig, LlamaModel
        from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
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


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token: int = PAD_TOKEN) -> PromptCondition:
    """Prompts of text tokens, each with its start-of-image token last, padded on the left to the longest: (B, L)."""
    if not prompts or not all(prompts):
        raise UserError("prompts: empty; a prompt has at least its start-of-image token")
    length = max(len(prompt) for prompt in prompts)
    tokens = [[pad_token] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return PromptCondition(torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask))


class JanusGenerator(CausalGenerator[PromptCondition]):
    """Needs transformers.

    `prefix_length` is `config.max_prompt_tokens`, whatever the length of the prompts given: hidden states are padded on
    the left with zeros to that many.
    """

    config: JanusConfig
    language_model: Any  # transformers' `LlamaModel`; the package is optional
    generation_embeddings: nn.Module
    generation_aligner: nn.Module
    generation_head: Any  # transformers' `JanusVQVAEHead`

    def __init__(self, config: JanusConfig):
        super().__init__(config, num_classes=0)
        for name, part in build_parts(config).items():
            self.add_module(name, part)
        device = torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The name of the list in transformers' files is `language_model.layers`."""
        return self.language_model.layers

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Normals of std 0.02, as transformers draws them; biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=rng)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def null_condition(self, condition: PromptCondition) -> PromptCondition:
        """The same prompts with padding tokens between their first and their last token; the mask stays."""
        starts = condition.mask & (condition.mask.cumsum(1) == 1)
        starts[:, -1] = True
        tokens = condition.tokens.masked_fill(condition.mask & ~starts, self.config.pad_token)
        return replace(condition, tokens=tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.generation_head
        return product_in_float32(head.vision_head, head.activation_fn(head.proj_out(self.language_model.norm(hidden))))

    def hidden_states(
        self,
        context: Tensor,
        condition: PromptCondition,
        *,
        cache: KVCache | None = None,
        tap_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Before the last norm, and without what pads the taps on the left.

        Raises `UserError` for a condition that is no prompt, and for prompts that are too long.
        """
        reads_prompt = cache is None or cache.read == 0
        if reads_prompt:
            self._check(condition)
        spare = self.prefix_length - condition.tokens.shape[1]
        # Under autocast the aligner's output has fewer bits than the residual stream, which starts as an embedding.
        x = self.generation_aligner(self.generation_embeddings(context)).to(self.language_model.norm.weight.dtype)
        if reads_prompt:
            x = torch.cat([self.language_model.embed_tokens(condition.tokens), x], 1)
        kept, count = condition.mask, x.shape[1]
        if cache is None:
            positions, *turns = self.tables(kept)
            positions = positions[:, :count]
        else:
            kept = F.pad(kept, (spare, 0), value=False)
            if reads_prompt:
                cache.keep(self.tables(kept))
                cache.advance(spare)  # positions of the longest prompt that this one leaves unused; masked
            positions, *turns = cache.tables
            positions = positions[:, cache.places(count)]
        turns = [F.embedding(positions, turn).to(x.dtype) for turn in turns]
        mask = attention_mask(count, kept, cache, x.device)
        x, taps = self.run_blocks(x, tuple(turns), mask, cache, tap_layers)
        if reads_prompt:
            taps = {layer: F.pad(tap, (0, 0, spare, 0)) for layer, tap in taps.items()}
        return x, taps

    def tables(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the rows (B, T) int64, 0 at padding, where nobody looks; cosine and sine (T, width of a head) of
        each; T is as many as `kept` (B, P or L) and the image's tokens."""
        positions = (F.pad(kept, (0, self.num_tokens), value=True).cumsum(1) - 1).clamp_min(0)
        every = torch.arange(positions.shape[1], device=kept.device)
        return positions, *rotary(every, self.width // self.config.num_heads, self.config.rope_base)

    def run_block(
        self, block: nn.Module, x: Tensor, needed: object, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        return block(x, attention_mask=mask, past_key_values=cache, position_embeddings=needed)

    def _check(self, condition: PromptCondition) -> None:
        if not isinstance(condition, PromptCondition):
            raise UserError(f"condition: {type(condition).__name__}; this generator reads prompts (PromptCondition)")
        if condition.tokens.shape[1] > self.prefix_length:
            raise UserError(
                f"condition: prompts of {condition.tokens.shape[1]} tokens; model.max_prompt_tokens is "
                f"{self.prefix_length}"
            )
