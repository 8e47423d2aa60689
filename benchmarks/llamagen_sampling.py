"""Guided sampling of LlamaGen-B, 256 tokens: our sampler against a straightforward cached one.

The alternative does what the released samplers of RAR and AliTok do at every token: embeds the whole prefix and makes
its table of positions again, keeps the last position of both, and grows every layer's keys and values by
concatenation. Both run conditional and null rows as one batch and must choose equal tokens. On a CPU the alternative
multiplies as PyTorch does by default; a third run gives it our products (`kernels.tune`) to tell the two gains
apart.

Run: python benchmarks/llamagen_sampling.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import interleaved, ratio, write_result
from torch import Tensor
from torch.nn import functional as F

from consonar.attention import rotate
from consonar.cpu import timing
from consonar.cpu.kernels import tune
from consonar.generators.llamagen import LLAMAGEN_PRESETS, Attention, LlamaGenGenerator
from consonar.generators.rotary import rotary_table
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.types import Grid


def growing_attention(attention: Attention, x: Tensor, table: Tensor, past: tuple[Tensor, Tensor] | None):
    """(B, n, D), and the keys and values of all positions: the past ones concatenated with the new."""
    batch, length, _ = x.shape
    q, k, v = attention.wqkv(x).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, table), rotate(k, table)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
    return attention.wo(mixed.transpose(1, 2).reshape(batch, length, -1)), (k, v)


@torch.inference_mode()
def growing_greedy(model: LlamaGenGenerator, condition: Tensor, scale: float) -> Tensor:
    """The alternative: (B, N) most likely tokens under guidance."""
    config, count = model.config, len(condition)
    rows = torch.cat([condition, model.null_condition(condition)])
    tokens = torch.empty(count, 0, dtype=torch.int64, device=condition.device)
    past: list[tuple[Tensor, Tensor] | None] = [None] * config.num_layers
    while tokens.shape[1] < model.num_tokens:
        x = torch.cat([model.embed_condition(rows), model.embed_tokens(torch.cat([tokens, tokens]))], 1)
        table = rotary_table.__wrapped__(  # what the cache of tables holds, made again
            config.width // config.num_heads, 1, model.num_tokens, config.grid, config.rope_base, x.device
        )[: x.shape[1]]
        if past[0] is not None:
            x, table = x[:, -1:], table[-1:]
        for layer, block in enumerate(model.blocks):
            mixed, past[layer] = growing_attention(block.attention, block.attention_norm(x), table, past[layer])
            x = x + mixed
            x = x + block.feed_forward(block.ffn_norm(x))
        logits = model.output(model.norm(x))[:, -1]
        conditional, unconditional = logits[:count], logits[count:]
        token = (unconditional + scale * (conditional - unconditional)).argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens


def growing_plain(model: LlamaGenGenerator, condition: Tensor, scale: float) -> Tensor:
    """`growing_greedy` with PyTorch's own products."""
    with timing.forced("linear", False):
        return growing_greedy(model, condition, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LLAMAGEN_PRESETS["B"].num_layers)
    parser.add_argument("--side", type=int, default=16, help="rows and columns of the token grid")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens = args.side**2
    config = LLAMAGEN_PRESETS["B"].sized(16384, num_tokens, 1000, Grid(args.side, args.side))
    model = tune(LlamaGenGenerator(replace(config, num_layers=args.layers)))
    rng = seeded(0, "benchmark")
    model.reset_parameters(rng)
    # A fresh output layer is zero, and every token as likely as any other.
    torch.nn.init.normal_(model.output.weight, std=0.02, generator=rng)
    model = model.to(device).eval()
    condition = torch.arange(args.batch_size, device=device)
    greedy = SamplerConfig(temperature=0, guidance_scale=args.guidance_scale)
    runs = {
        "ours": lambda: sample_tokens(model, condition, range(args.batch_size), greedy)[0],
        "growing": lambda: growing_plain(model, condition, args.guidance_scale),
        "growing, our products": lambda: growing_greedy(model, condition, args.guidance_scale),
    }
    tokens = {name: run() for name, run in runs.items()}
    seconds = interleaved(runs, args.rounds)
    figures = {
        "growing / ours": round(ratio(seconds, "growing", "ours"), 2),
        "growing, our products / ours": round(ratio(seconds, "growing, our products", "ours"), 2),
        "equal tokens": {name: float((tokens[name] == tokens["ours"]).float().mean()) for name in runs},
        "distinct tokens": len(tokens["ours"].unique()),
        "seconds": seconds,
    }
    settings = {"preset": "B", "layers": args.layers, "tokens": num_tokens, "batch_size": args.batch_size}
    write_result("llamagen_sampling", {**settings, "guidance_scale": args.guidance_scale}, 0, figures)


if __name__ == "__main__":
    main()
