"""Which layer of a generator knows a token's code: linear probes, and where reAR's heads would go.

For every block a ridge regression in closed form from its output to the code of the token that is read there (current)
and of the one that is predicted there (next), fitted on half of the pictures and scored on the other half, both ways.
reAR (arXiv 2510.04450) puts its heads where a plain generator is closest to the codes: the encode head where the
current token is, at the first layer in the article, the decode head where the next token is, at three quarters.

Letters: `n` pictures, `B` some of them, `N` tokens, `P` prefix positions, `D` width, `C` code width, `L` layers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from consonar.diagnostics.findings import Curve, Figure, Finding, Interval
from consonar.diagnostics.statistics import Products, bootstrap_weights, intervals
from consonar.diagnostics.subject import Subject
from consonar.float32 import in_float32
from consonar.records import rows, to_device

TARGETS = {"current": 0, "next": 1}
"""How many positions before the one that reads a token its code is asked for."""
MEMORY = 2**28
"""Bytes of products that are held at a time; a layer takes 8 (D + C) D for each half and target."""


def probed(hidden: Tensor, prefix: int, target: str) -> Tensor:
    """(B, N, D): of hidden states (B, P + N, D) those at which the code of token i is asked for: `current`, where it
    is read; `next`, where it is predicted."""
    start = prefix - TARGETS[target]
    return hidden[:, start : hidden.shape[1] - TARGETS[target]]


@in_float32
def cosines(hidden: Tensor, codes: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
    """(B,) float64: mean cosine over the tokens of a probe's prediction from (B, N, D) and the codes (B, N, C)."""
    weights, offset = (to_device(part, hidden.device) for part in fitted)
    return F.cosine_similarity(hidden.float() @ weights + offset, codes, dim=2).double().mean(1).cpu()


def not_worse(draws: Tensor, best: int) -> list[int]:
    """The layers whose mean is not resolvably below that of layer `best`: draws (1 + R, L)."""
    return [layer for layer, gap in enumerate(intervals(draws - draws[:, best : best + 1])) if gap.sign >= 0]


def layer_probe(subject: Subject) -> Finding:
    """The curves over depth, and the layer that is best for each head."""
    generator, tokens = subject.generator, subject.held_out.tokens
    count, depth = len(tokens), generator.num_layers
    half = torch.arange(count) % 2  # two layers of one set, spread evenly over it
    size = 8 * 4 * generator.width * (generator.width + subject.tokenizer.code_dim)
    at_once = max(1, MEMORY // size)
    scores = {target: torch.zeros(count, depth, dtype=torch.float64) for target in TARGETS}
    for first in range(0, depth, at_once):
        layers = tuple(range(first, min(first + at_once, depth)))
        products = {
            (layer, target, side): Products(generator.width, subject.tokenizer.code_dim)
            for layer in layers for target in TARGETS for side in (0, 1)
        }  # fmt: skip
        for part, hidden, codes in states(subject, layers):
            for (layer, target, side), kept in products.items():
                rows = half[part] == side
                kept.add(
                    probed(hidden[layer], generator.prefix_length, target)[rows].flatten(0, 1),
                    codes[rows].flatten(0, 1),
                )
        fitted = {key: kept.ridge() for key, kept in products.items()}
        for part, hidden, codes in states(subject, layers):
            for (layer, target, side), probe in fitted.items():
                rows = half[part] != side
                states_of = probed(hidden[layer], generator.prefix_length, target)[rows]
                scores[target][torch.arange(count)[part][rows], layer] = cosines(states_of, codes[rows], probe)
    return found_in(scores, subject, depth)


def states(subject: Subject, layers: tuple[int, ...]) -> Iterator[tuple[slice, dict[int, Tensor], Tensor]]:
    """Rows, hidden states after each layer (B, P + N, D), and the true codes (B, N, C), batch by batch."""
    pictures = subject.held_out
    for part in subject.parts(len(pictures.tokens)):
        tokens = to_device(pictures.tokens[part], subject.device)
        condition = to_device(rows(pictures.condition, part), subject.device)
        yield part, subject.generator(tokens, condition, tap_layers=layers)[1], subject.tokenizer.embed(tokens).float()


def found_in(scores: dict[str, Tensor], subject: Subject, depth: int) -> Finding:
    """The finding of cosines (n, L) for each target."""
    weights = bootstrap_weights(subject.held_out.tokens.shape[0], subject.settings.seed, "layers")
    draws = {target: weights @ values for target, values in scores.items()}
    curves = {target: intervals(draw) for target, draw in draws.items()}
    best = {target: int(draw[0].argmax()) for target, draw in draws.items()}
    equal = {target: not_worse(draw, best[target]) for target, draw in draws.items()}
    baseline = mean_code(subject)
    encode, decode = equal["current"][0], best["next"]
    numbers: dict[str, Interval] = {}
    for target, found in curves.items():
        numbers |= {f"cosine with the {target} token's code, layer {layer}": value for layer, value in enumerate(found)}
    numbers["cosine of the mean code, what knowing nothing reaches"] = baseline
    listed = {target: ", ".join(map(str, layers)) for target, layers in equal.items()}
    return Finding(
        f"The current token's code is clearest at layer {best['current']} ({curves['current'][best['current']].text}; "
        f"no worse within intervals: {listed['current']}), the next one's at layer {decode} of 0 to {depth - 1} "
        f"({curves['next'][decode].text}; {listed['next']}). For reAR's heads that suggests --objective.encode-layer "
        f"{encode} --objective.decode-layer {decode}; the article's places are 0 and three quarters of the depth, here "
        f"{depth * 3 // 4}.",
        numbers,
        [Figure("Cosine with the token's code over depth", "layer", "cosine, held-out pictures",
                [Curve(f"{target} token", range(depth), found) for target, found in curves.items()]
                + [Curve("mean code", range(depth), [baseline] * depth)])],
    )  # fmt: skip


def mean_code(subject: Subject) -> Interval:
    """The cosine that the mean of the codes has with each of them."""
    codes = torch.cat([subject.tokenizer.embed(to_device(subject.held_out.tokens[part], subject.device)).float().cpu()
                       for part in subject.parts(len(subject.held_out.tokens))])  # fmt: skip
    likeness = F.cosine_similarity(codes.mean((0, 1)).expand_as(codes), codes, dim=2).double().mean(1, keepdim=True)
    return intervals(bootstrap_weights(len(codes), subject.settings.seed, "layers") @ likeness)[0]
