"""Image generation of Janus (arXiv 2410.13848) and Janus-Pro (arXiv 2501.17811): a Llama that reads a prompt, then
image tokens.

Keys are those of transformers' `JanusModel`. Facts kept from the released code: blocks are Llama's (RMSNorm, rotary
positions, SwiGLU, no biases); image tokens enter as aligner(embedding of the
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
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import CausalAttention, KVCache, attention_mask
from consonar.errors import UserError
from consonar.float32 import product_in_float32
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.generators.rotary import RMSNorm, rotary_angles
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


def turned(x: Tensor, table: Tensor) -> Tensor:
    """Turns pairs of x (B, H, n, E), a number of the first half and one of the second, by the cosines and sines `table`
    (2, B, n, E); in float32, returned as it came."""
    cosine, sine = table[:, :, None]
    first, second = x.float().chunk(2, -1)
    return (x * cosine + torch.cat([-second, first], -1) * sine).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.head_dim = config.width // config.num_heads
        of_keys = config.num_key_heads * self.head_dim
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, of_keys, bias=False)
        self.v_proj = nn.Linear(config.width, of_keys, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.attend = CausalAttention()

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = (
            projected(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, n, E)
            for projected in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, table), turned(k, table)
        return self.o_proj(self.attend(q, k, v, mask=mask, cache=cache, layer=layer, dropout=0.0))


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), no biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.width, config.mlp_width)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """x (B, n, D) -> (B, n, D)."""
        x = x + self.self_attn(self.input_layernorm(x), table, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """The parts of a Llama; `JanusGenerator` runs them."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        # Without a padding index: the embedding that fills the null prompt would get no gradient.
        self.embed_tokens = nn.Embedding(config.text_vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Aligner(nn.Module):
    """From the embedding of a code to the width of the language model: Linear, GELU, Linear."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.code_dim, config.width)
        self.hidden_layers = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden_layers[0](F.gelu(self.fc1(x)))


class Head(nn.Module):
    """Logits of the codes: Linear, GELU, Linear."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        hidden = config.head_width or config.width
        self.proj_out = nn.Linear(config.width, hidden)
        self.vision_head = nn.Linear(hidden, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return product_in_float32(self.vision_head, F.gelu(self.proj_out(x)))


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token: int = PAD_TOKEN) -> PromptCondition:
    """Prompts of text tokens, each with its start-of-image token last, padded on the left to the longest: (B, L)."""
    if not prompts or not all(prompts):
        raise UserError("prompts: empty; a prompt has at least its start-of-image token")
    length = max(len(prompt) for prompt in prompts)
    tokens = [[pad_token] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return PromptCondition(torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask))


class JanusGenerator(CausalGenerator[PromptCondition]):
    """`prefix_length` is `config.max_prompt_tokens`, however long prompts are: taps are padded on the left with zeros
    to that many."""

    config: JanusConfig

    def __init__(self, config: JanusConfig):
        super().__init__(config, num_classes=0)
        self.language_model = LanguageModel(config)
        self.generation_embeddings = nn.Embedding(config.vocab_size, config.code_dim)
        self.generation_aligner = Aligner(config)
        self.generation_head = Head(config)
        self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """In files the list is `language_model.layers`."""
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
        return self.generation_head(self.language_model.norm(hidden))

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
        table = torch.stack([F.embedding(positions, turn) for turn in turns])  # (2, B, n, E)
        mask = attention_mask(count, kept, cache, x.device)
        x, taps = self.run_blocks(x, table, mask, cache, tap_layers)
        if reads_prompt:
            taps = {layer: F.pad(tap, (0, 0, spare, 0)) for layer, tap in taps.items()}
        return x, taps

    def tables(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the rows (B, T) int64, 0 at padding, where nobody looks; cosine and sine (T, width of a head) of
        each; T is as many as `kept` (B, P or L) and the image's tokens."""
        positions = (F.pad(kept, (0, self.num_tokens), value=True).cumsum(1) - 1).clamp_min(0)
        every = torch.arange(positions.shape[1], device=kept.device)
        return positions, *rotary(every, self.width // self.config.num_heads, self.config.rope_base)

    def _check(self, condition: PromptCondition) -> None:
        if not isinstance(condition, PromptCondition):
            raise UserError(f"condition: {type(condition).__name__}; this generator reads prompts (PromptCondition)")
        if condition.tokens.shape[1] > self.prefix_length:
            raise UserError(
                f"condition: prompts of {condition.tokens.shape[1]} tokens; model.max_prompt_tokens is "
                f"{self.prefix_length}"
            )
