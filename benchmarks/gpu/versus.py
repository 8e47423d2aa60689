"""Our way against named alternatives, both in one run on one device: stages of `timing.py` that give a ratio.

The alternatives are written out in `benchmarks/`: what they calculate is what ours does, as its released code does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import vapi as vapi_benchmark
from common import interleaved, ratio
from llamagen_sampling import growing_greedy
from sampling import recompute_greedy

from consonar.attention import rotate
from consonar.generators import build_generator
from consonar.generators.base import GeneratorConfig
from consonar.generators.llamagen import LlamaGenGenerator
from consonar.sampling.sample import SamplerConfig, decoder_of, draw_batch, sample_tokens
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training.objectives.policy import PolicyConfig

BF16 = torch.bfloat16
ROUNDS = 2


def compare(runs: dict[str, Callable[[], object]], bench: Any, rounds: int = ROUNDS) -> dict[str, Any]:
    """How many times as long as the first of `runs`, ours, each of the others takes."""
    seconds = interleaved(runs, 1 if bench.toy else rounds)
    ours, *others = runs
    return {f"{name} / {ours}": round(ratio(seconds, name, ours), 3) for name in others} | {"seconds": seconds}


def compare_tokens(runs: dict[str, Callable[[], Tensor]], bench: Any) -> dict[str, Any]:
    """`compare`, with the share of tokens that each alternative draws as ours does."""
    drawn = {name: run() for name, run in runs.items()}
    ours = next(iter(drawn.values()))
    equal = {name: float((tokens == ours).float().mean()) for name, tokens in drawn.items()}
    return {**compare(runs, bench), "equal_tokens": equal}


def published_rear(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, bench: Any) -> dict[str, Any]:
    """reAR's released sampler has no cache: it reads the whole prefix for every token."""
    model = bench.made(build_generator, bench.sized(preset, vocab_size, side)).to(BF16)
    labels, greedy = torch.arange(rows, device=bench.device), SamplerConfig(temperature=0)
    return compare_tokens(
        {
            "ours": lambda: sample_tokens(model, labels, range(rows), greedy)[0],
            "no cache": lambda: recompute_greedy(model, labels),
        },
        bench,
    )


def published_llamagen(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, bench: Any) -> dict[str, Any]:
    """RAR's and AliTok's samplers grow their cache by concatenation; LlamaGen's reads a static one, compiled."""
    model = bench.made(build_generator, bench.sized(preset, vocab_size, side)).to(BF16)
    labels, config = torch.arange(rows, device=bench.device), SamplerConfig(temperature=0, guidance_scale=2.0)
    static, skipped = StaticSampler(model, rows, compiled=not bench.toy), counters["inductor"]["cudagraph_skips"]
    figures = compare_tokens(
        {
            "ours": lambda: sample_tokens(model, labels, range(rows), config)[0],
            "growing cache": lambda: growing_greedy(model, labels, config.guidance_scale),
            "static cache, compiled": lambda: static.greedy(labels, config.guidance_scale),
        },
        bench,
    )
    if counters["inductor"]["cudagraph_skips"] > skipped:
        raise RuntimeError("static cache, compiled: PyTorch made no CUDA graph of it, as the released sampler has")
    return figures


class StaticSampler:
    """LlamaGen's sampler as released: a cache of all positions, every one of which each token attends to under a mask,
    and one compiled call a token (mode `reduce-overhead`, CUDA graphs by PyTorch)."""

    def __init__(self, model: LlamaGenGenerator, rows: int, compiled: bool):
        self.model, config = model, model.config
        length, weight = 1 + model.num_tokens, model.output.weight
        shape = (config.num_layers, 2, 2 * rows, config.num_key_heads, length, config.width // config.num_heads)
        self.cache, self.table = weight.new_zeros(shape), model.rotary_table(weight.device)
        torch._dynamo.mark_static_address(self.cache)  # which a graph writes to: only then PyTorch makes one
        self.causal = torch.ones(length, length, dtype=torch.bool, device=weight.device).tril()
        self.one = torch.compile(self.logits, mode="reduce-overhead", fullgraph=True) if compiled else self.logits

    def logits(self, x: Tensor, place: Tensor) -> Tensor:
        """(2 rows, V) after reading x (2 rows, 1, D) at `place` (1,)."""
        table, mask = self.table[place], self.causal[place]
        for layer, block in enumerate(self.model.blocks):
            attention = block.attention
            heads = attention.wqkv(block.attention_norm(x)).unflatten(-1, (3, attention.num_heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            keys, values = self.cache[layer]
            keys.index_copy_(2, place, rotate(k, table))
            values.index_copy_(2, place, v)
            mixed = F.scaled_dot_product_attention(rotate(q, table), keys, values, attn_mask=mask)
            x = x + attention.wo(mixed.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
        return self.model.output(self.model.norm(x))[:, -1]

    @torch.no_grad()
    def greedy(self, labels: Tensor, scale: float) -> Tensor:
        """(rows, N) most likely tokens under guidance."""
        model, count = self.model, len(labels)
        x, tokens = model.embed_condition(torch.cat([labels, model.null_condition(labels)])), []
        for position in range(model.num_tokens):
            logits = self.one(x, torch.tensor([position], device=labels.device)).clone()
            conditional, unconditional = logits[:count].float(), logits[count:].float()
            tokens.append((unconditional + scale * (conditional - unconditional)).argmax(-1))
            x = model.embed_tokens(torch.cat([tokens[-1], tokens[-1]])[:, None])
        return torch.stack(tokens, 1)


def rollout(preset: GeneratorConfig, vocab_size: int, side: int, rows: int, bench: Any) -> dict[str, Any]:
    """Free rollouts of post-training are drawn under autocast: graphs are captured for each, which costs time too."""
    model = bench.made(build_generator, bench.sized(preset, vocab_size, side))
    labels = torch.arange(rows, device=bench.device)

    @torch.autocast(bench.device.type, BF16)
    def run(graphs: bool) -> None:
        draw_batch(decoder_of(model, SamplerConfig(), graphs=graphs), labels, range(rows))

    return compare({"graphs": partial(run, True), "no graphs": partial(run, False)}, bench)


def published_vapi(
    preset: GeneratorConfig, tokenizer: VQConfig, side: int, pictures: int, group: int, bench: Any
) -> dict[str, Any]:
    """VA-pi's released trainer: a pass with gradient and one of the start model for each of the samples."""
    vq = replace(tokenizer, image_size=16 * side)
    if bench.toy:
        pictures, group, vq = 2, 2, replace(vq, image_size=32, base_channels=32, latent_channels=32)
    made = bench.made(VQTokenizer, vq).requires_grad_(False)
    shape = bench.sized(preset, vq.vocab_size, vq.image_size // 16)
    config = PolicyConfig(rewards=vapi_benchmark.REWARDS, group_size=group, chunk=16)
    pair = vapi_benchmark.Bench(bench.made(build_generator, shape), made, config, pictures)
    ways = {"shared context": pair.ours, "released": pair.released}
    splits = {name: pair.split(way, 1 if bench.toy else ROUNDS) for name, way in ways.items()}
    ratios = {part: splits["released"][part] / splits["shared context"][part] for part in ("step", "generator")}
    return {"released / shared context": ratios, "seconds": splits}
