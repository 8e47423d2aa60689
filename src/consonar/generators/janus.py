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
here slot i comes from the position before.) There are no classes: the condition is a `PromptCondition`, `num_classes`
is 0, and token stores with or without classes fit. The understanding half (vision encoder, its aligner, text head) is
not built.

Letters: `B` batch, `L` prompt positions of a batch, `P` of the longest prompt allowed, `n` image tokens, `V` codes,
`D` width, `T` positions read so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.attention import KVCache, attention_mask
from consonar.errors import UserError
from consonar.generators.base import CausalGenerator
from consonar.generators.janus_parts import PAD_TOKEN, CacheLayers, JanusConfig, build_parts, rotary
from consonar.types import PromptCondition

JANUS_PRESETS = {
    "1B": JanusConfig(),
    "7B": JanusConfig(width=4096, num_layers=30, num_heads=32, mlp_width=11008),
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
    """The generator; follows `consonar.types.Generator`. `config` has all sizes set; needs transformers.

    `prefix_length` is `config.max_prompt_tokens`, whatever the length of the prompts given: hidden states are padded on
    the left with zeros to that many.
    """

    config: JanusConfig
    language_model: Any  # transformers' `LlamaModel`; the package is optional
    generation_embeddings: nn.Module
    generation_aligner: nn.Module
    generation_head: nn.Module

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

        Raises `UserError` for a condition that is no prompt, too long, or not padded on the left.
        """
        reads_prompt = cache is None or cache.length == 0
        if reads_prompt:
            self._check(condition)
        length = condition.tokens.shape[1]
        spare = self.prefix_length - length
        # Under autocast the aligner's output has fewer bits than the residual stream, which starts as an embedding.
        x = self.generation_aligner(self.generation_embeddings(context)).to(self.language_model.norm.weight.dtype)
        if reads_prompt:
            x = torch.cat([self.language_model.embed_tokens(condition.tokens), x], 1)
        if cache is not None and cache.length == 0:
            cache.advance(spare)  # positions of the longest prompt that this one leaves unused; masked
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        valid = F.pad(condition.mask, (spare if cache is not None else 0, 0), value=False)
        valid = F.pad(valid, (0, end - valid.shape[1]), value=True)  # (B, T)
        x, taps = self._blocks(x, valid, start, cache, tap_layers)
        if reads_prompt:
            taps = {layer: F.pad(tap, (0, 0, spare, 0)) for layer, tap in taps.items()}
        if cache is not None:
            cache.advance(end - start)
        return x, taps

    def _blocks(
        self, x: Tensor, valid: Tensor, start: int, cache: KVCache | None, tap_layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x (B, T - start, D) through all blocks, and what comes out of those of `tap_layers`."""
        positions = (valid.cumsum(1) - 1).clamp_min(0)[:, start:]  # of padding: 0, where nobody looks
        tables = rotary(positions, self.width // self.config.num_heads, self.config.rope_base)
        tables = (tables[0].to(x.dtype), tables[1].to(x.dtype))
        num_keys, taps = valid.shape[1], {}
        mask = attention_mask(num_keys - start, num_keys, valid, cached=cache is not None, device=x.device)
        layers = CacheLayers(cache) if cache is not None else None
        for index, block in enumerate(self.blocks):
            x = block(x, attention_mask=mask, past_key_values=layers, position_embeddings=tables)
            if index in tap_layers:
                taps[index] = x
        return x, taps

    def _check(self, condition: PromptCondition) -> None:
        if not isinstance(condition, PromptCondition):
            raise UserError(f"condition: {type(condition).__name__}; this generator reads prompts (PromptCondition)")
        if condition.tokens.shape[1] > self.prefix_length:
            raise UserError(
                f"condition: prompts of {condition.tokens.shape[1]} tokens; model.max_prompt_tokens is "
                f"{self.prefix_length}"
            )
        if not (condition.mask[:, -1].all() and (condition.mask.diff(dim=1).sum(1) <= 1).all()):
            raise UserError("condition: prompts are not padded on the left, with the start-of-image token last")
