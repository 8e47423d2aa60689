"""Diagnostics of a generator under given tokens: noise, training against held-out pictures, places on the grid.

All are of the generator itself: no guidance, temperature 1. Letters: `n` pictures, `N` tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from consonar.diagnostics import forcing
from consonar.diagnostics.findings import Curve, Figure, Finding, HeatMap, Interval, resolved
from consonar.diagnostics.statistics import bootstrap_weights, intervals, mean_intervals
from consonar.diagnostics.subject import Subject
from consonar.seeding import generator
from consonar.training.noise import corrupt_tokens
from consonar.types import Grid

RATES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CROSS_ENTROPY = "cross-entropy, nats per token"


def noise_robustness(subject: Subject) -> Finding:
    """Teacher-forced cross-entropy and accuracy where context tokens are any code with a probability."""
    pictures, seed = subject.held_out, subject.settings.seed
    columns = []
    for rate in RATES:
        rates = torch.full((len(pictures.tokens),), rate)
        rng = generator(seed, "diagnosis", "noise")
        context, _ = corrupt_tokens(pictures.tokens, rates, subject.tokenizer.vocab_size, rng)
        columns.append(forcing.scores(subject, context, pictures.tokens, pictures.condition).mean(2).T)  # (n, 3)
    weights = bootstrap_weights(len(pictures.tokens), seed, "noise")
    cross_entropy, accuracy, _ = (weights @ torch.stack(columns, 2)[:, i] for i in range(3))
    rise = intervals(cross_entropy - cross_entropy[:, :1])
    lost = intervals(accuracy[:, :1] - accuracy)
    numbers = {f"{CROSS_ENTROPY}, clean context": intervals(cross_entropy)[0]}
    numbers["accuracy, clean context"] = intervals(accuracy)[0]
    for rate, more, less in list(zip(RATES, rise, lost, strict=True))[1:]:
        numbers |= {f"cross-entropy added by {rate:.0%} noise": more, f"accuracy lost to {rate:.0%} noise": less}
    half = RATES.index(0.5)
    return Finding(
        f"Noise in a tenth of the context adds {rise[1].text} nats to {intervals(cross_entropy)[0].text}; in half of "
        f"it {rise[half].text} nats, and {lost[half].text} of accuracy are lost.",
        numbers,
        (
            Figure("Cross-entropy over noise", "share of context tokens replaced", CROSS_ENTROPY,
                   [Curve("held-out pictures", RATES, intervals(cross_entropy))]),
            Figure("Accuracy over noise", "share of context tokens replaced", "accuracy",
                   [Curve("held-out pictures", RATES, intervals(accuracy))]),
        ),
    )  # fmt: skip


def train_gap(subject: Subject) -> Finding | str:
    """Teacher-forced cross-entropy and accuracy of training pictures beside held-out ones."""
    if subject.train is None:
        return "the data have no training pictures beside the held-out ones"
    rows, both = [], {"training": subject.train, "held-out": subject.held_out}
    for name, pictures in both.items():
        per_picture = forcing.scores(subject, pictures.tokens, pictures.tokens, pictures.condition).mean(2).T
        rows.append(bootstrap_weights(len(per_picture), subject.settings.seed, name) @ per_picture)  # (1 + R, 3)
    names = (CROSS_ENTROPY, "accuracy", "entropy, nats per token")
    numbers = {
        f"{name}, {which} pictures": interval
        for which, draws in zip(both, rows, strict=True)
        for name, interval in zip(names, intervals(draws), strict=True)
    }
    gap, right, _ = intervals(rows[1] - rows[0])
    numbers |= {"cross-entropy, held-out above training": gap, "accuracy, held-out above training": right}
    words = resolved(gap, "harder", "easier", "no harder")
    others = f" {subject.foreign}" if subject.foreign else ""
    return Finding(
        f"Held-out pictures are {words} than training pictures: cross-entropy {gap.text} nats above "
        f"{numbers[f'{CROSS_ENTROPY}, training pictures'].text}; accuracy {right.text}.{others}",
        numbers,
    )


def on_grid(values: Tensor, grid: Grid | None) -> list[list[float | None]]:
    """(N,) as rows for a heat map: raster order, tokens without a place in rows of their own above; without a grid in
    rows that are about square."""
    numbers: list[float | None] = values.tolist()
    columns = grid.columns if grid else max(1, round(len(numbers) ** 0.5))
    prefix = grid.prefix if grid else 0
    parts = [part for part in (numbers[:prefix], numbers[prefix:]) if part]
    rows = [part[start : start + columns] for part in parts for start in range(0, len(part), columns)]
    return [row + [None] * (columns - len(row)) for row in rows]


def map_of(name: str, values: Sequence[Interval], grid: Grid | None) -> HeatMap:
    """The numbers called `name` of every token (N,)."""
    where = "in raster order" if grid else "in order"
    sides = torch.tensor(values, dtype=torch.float64).T
    rows, low, high = (on_grid(side, grid) for side in sides)
    return HeatMap(name.capitalize(), rows, name, f"A square is a token, {where}.", low, high)


def positions(subject: Subject) -> Finding:
    """Entropy, cross-entropy and accuracy of every token of the grid, under the true tokens before it."""
    pictures, grid = subject.held_out, subject.tokenizer.grid
    per_token = forcing.scores(subject, pictures.tokens, pictures.tokens, pictures.condition)  # (3, n, N)
    weights = bootstrap_weights(len(pictures.tokens), subject.settings.seed, "positions")
    names = (CROSS_ENTROPY, "accuracy", "entropy, nats")
    found = [mean_intervals(values, weights) for values in per_token]
    length = pictures.tokens.shape[1]
    quarter = max(1, length // 4)
    ends = [
        intervals(weights @ v[:, part].mean(1, keepdim=True))
        for v in per_token
        for part in (slice(quarter), slice(-quarter, None))
    ]
    halves = [f"{name}, {part} quarter of the tokens" for name in names for part in ("first", "last")]
    numbers = {name: interval for name, (interval,) in zip(halves, ends, strict=True)}
    changes = intervals(weights @ (per_token[:, :, -quarter:].mean(2) - per_token[:, :, :quarter].mean(2)).T)
    numbers |= {f"{name}, last above first quarter": change for name, change in zip(names, changes, strict=True)}
    words = resolved(changes[0], "harder", "easier", "as hard")
    return Finding(
        f"The last quarter of the tokens is {words} to predict: cross-entropy {changes[0].text} nats, accuracy "
        f"{changes[1].text}, entropy {changes[2].text} nats against the first quarter.",
        numbers,
        [
            Figure("Cross-entropy and entropy by position", "position of the token", "nats",
                   [Curve("cross-entropy", range(length), found[0]), Curve("entropy", range(length), found[2])]),
        ],
        [map_of(name, values, grid) for name, values in zip(names, found, strict=True)],
    )  # fmt: skip
