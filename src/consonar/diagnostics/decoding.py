"""Diagnostics of the decoder: how far a token reaches, what wrong tokens cost, and whose the distance of samples is.

pFID (Qiu et al. 2025, arXiv 2503.08354: reconstruction under perturbed tokens) says how much of a generator's errors a
tokenizer forgives, where rFID is of true tokens alone. Deviations: any feature network; two perturbations, any code or
one of the nearest, as curves over the rate; few pictures, so compare at equal numbers of them only.

The gap gFID - rFID is told apart by sets of pictures against one set of *other* real pictures, all of one size, so that
the bias of few pictures is much the same in all: real ones, those decoded from their own tokens, from tokens drawn
under the true ones, and from free draws of the same classes. Each difference of neighbours has one cause.

Letters: `n` pictures, `m` changed ones, `N` tokens, `h`, `w` rows and columns of tokens, `F` features.
"""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from consonar.data.transforms import from_uint8
from consonar.diagnostics import forcing
from consonar.diagnostics.codes import neighbours
from consonar.diagnostics.findings import Curve, Figure, Finding, HeatMap, Interval, resolved
from consonar.diagnostics.statistics import (
    bootstrap_weights,
    groups_of,
    intervals,
    jackknife,
    mean_intervals,
)  # fmt: skip
from consonar.diagnostics.subject import Subject
from consonar.metrics import protocol_line
from consonar.metrics.frechet import frechet_distance_of_rows
from consonar.metrics.pixels import psnr_of
from consonar.seeding import generator, integers
from consonar.training.noise import corrupt_tokens
from consonar.training.objectives.base import codebook_of

RATES = (0.0, 0.05, 0.1, 0.2, 0.4)
NEAREST = 16
"""Codes that a near perturbation takes one of."""
PLACES = 4
"""Tokens of each picture that are changed, one at a time."""
ENERGY = 0.9
"""Share of what changes that the reach of a token holds."""


def squared_change(changed: np.ndarray, truth: np.ndarray) -> Tensor:
    """(m, H, W) float32: squared difference on the scale of 0 to 1, summed over colours, of uint8 pictures."""
    return (from_uint8(torch.from_numpy(changed)) - from_uint8(torch.from_numpy(truth))).square().sum(1) / 4


def change_by_distance(change: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """(m, max(h, w)): how much a picture changed, (m, H, W), summed over cells by how many tokens away (the larger of
    rows and columns) they are from the token `places` (m,), in raster order, that was changed."""
    cells = F.adaptive_avg_pool2d(change[:, None].double(), shape)[:, 0]  # (m, h, w)
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    down, across = (places // shape[1])[:, None, None], (places % shape[1])[:, None, None]
    distance = torch.maximum((rows - down).abs(), (columns - across).abs())  # (m, h, w)
    found = torch.zeros(len(change), max(shape), dtype=torch.float64)
    return found.scatter_add_(1, distance.flatten(1), cells.flatten(1))


def mean_by_offset(change: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """(2 h - 1, 2 w - 1): the mean change of a token's cell by where it lies from the changed token, which is in the
    middle; over the pictures in which there is such a cell, 0 where there is none. Arguments as above."""
    (h, w), cells = shape, F.adaptive_avg_pool2d(change[:, None].double(), shape)[:, 0]
    total, count = torch.zeros(2 * h - 1, 2 * w - 1, dtype=torch.float64), torch.zeros(2 * h - 1, 2 * w - 1)
    for cell, place in zip(cells, places.tolist(), strict=True):
        window = (slice(h - 1 - place // w, 2 * h - 1 - place // w), slice(w - 1 - place % w, 2 * w - 1 - place % w))
        total[window] += cell
        count[window] += 1
    return total / count.clamp(min=1)


def reach_of(shares: Tensor) -> Tensor:
    """The distance within which a share of `ENERGY` lies, with fractions by straight lines, 0 where a token's own cell
    holds it: (R,) <- (R, distances)."""
    inside = shares.cumsum(1)
    before = F.pad(inside, (1, 0))[:, :-1]
    at = (inside >= ENERGY - 1e-9).double().argmax(1, keepdim=True)
    low, high = before.gather(1, at)[:, 0], inside.gather(1, at)[:, 0]
    return (at[:, 0] - 1 + ((ENERGY - low) / (high - low).clamp(min=1e-12)).clamp(max=1)).clamp(min=0)


def receptive_field(subject: Subject) -> Finding:
    """What of a picture changes when one token becomes another code, drawn from all."""
    tokens, seed, grid = subject.held_out.tokens, subject.settings.seed, subject.tokenizer.grid
    rng, (count, length) = generator(seed, "diagnosis", "reach"), tokens.shape
    prefix, rows, truth = grid.prefix if grid else 0, torch.arange(count), subject.decode(tokens)
    changes, places = [], []
    for _ in range(PLACES):
        place = integers(rng, prefix, length, count)
        other = integers(rng, 1, subject.tokenizer.vocab_size, count)
        changed = tokens.clone()
        changed[rows, place] = (changed[rows, place] + other) % subject.tokenizer.vocab_size
        decoded = subject.decode(changed)
        changes.append(squared_change(decoded, truth))
        places.append(place - prefix)
    weights = bootstrap_weights(count, seed, "reach")
    moved = torch.stack([(change > 0).double().flatten(1).mean(1) for change in changes], 1).mean(1, keepdim=True)
    areas = [change.double().flatten(1) for change in changes]
    effective = torch.stack([a.sum(1).square() / (a.square().sum(1) * a.shape[1]).clamp(min=1e-30) for a in areas], 1)
    (pixels,) = mean_intervals(moved, weights)
    (area,) = mean_intervals(effective.mean(1, keepdim=True), weights)
    numbers = {"share of pixels that change at all": pixels, "effective share of the picture's area": area}
    spread = f"One token changes {pixels.text} of the pixels, and the change fills {area.text} of the picture's area"
    if grid is None:
        return Finding(f"{spread}. These tokens have no place in the picture.", numbers)
    shape = (grid.rows, grid.columns)
    by_distance = sum(change_by_distance(*pair, shape) for pair in zip(changes, places, strict=True))
    draws = weights @ by_distance
    if not bool((draws.sum(1) > 0).all()):
        return Finding(f"{spread}. In too few pictures anything changes to say how far a token reaches.", numbers)
    draws = draws / draws.sum(1, keepdim=True)
    (reach,) = intervals(reach_of(draws)[:, None])
    own, within = intervals(draws[:, :1])[0], intervals(draws.cumsum(1))
    numbers |= {
        "share of the change in the token's own cell": own,
        f"reach: tokens that hold {ENERGY:.0%} of it": reach,
    }
    maps = mean_by_offset(torch.cat(changes), torch.cat(places), shape)
    half = min(6, shape[0] - 1, shape[1] - 1)
    middle = maps[shape[0] - 1 - half : shape[0] + half, shape[1] - 1 - half : shape[1] + half]
    return Finding(
        f"{spread}. {own.text} of it lies in the token's own cell, {ENERGY:.0%} within {reach.text} tokens.",
        numbers,
        [Figure("Share of the change by distance", "distance from the token, tokens", "share within",
                [Curve("squared change of pixels", range(len(within)), within)])],
        [HeatMap("Where a token is seen", (middle / middle.max()).tolist(), "share of the largest",
                 "The changed token is in the middle; squared change of pixels.")],
    )  # fmt: skip


def forgiveness(subject: Subject) -> Finding:
    """Reconstruction from tokens of which some are wrong: Fréchet distance, PSNR, perceptual distance over the rate."""
    pictures, seed = subject.held_out, subject.settings.seed
    count, size = len(pictures.tokens), subject.tokenizer.vocab_size
    used, nth = pictures.tokens.unique(), list(range(1, min(NEAREST, size - 1) + 1))
    table = torch.zeros(size, len(nth), dtype=torch.int64)
    table[used] = neighbours(codebook_of(subject.tokenizer, subject.device), used, nth)[0]
    shown_rows = subject.shown.numpy()
    near = f"one of the {len(nth)} nearest"
    kinds = {"any code": None, near: table}
    features, compared, shown = [], [], {"originals": pictures.images[shown_rows]}
    for kind, rate in product(kinds, RATES):
        rng, rates = generator(seed, "diagnosis", "forgiveness", kind), torch.full((count,), rate)
        decoded = subject.decode(corrupt_tokens(pictures.tokens, rates, size, rng, neighbours=kinds[kind])[0])
        features.append(subject.features(decoded))
        compared.append(torch.stack(subject.compare(decoded, pictures.images)))
        if rate in (0, 0.2):
            shown[f"a fifth of the tokens {kind}" if rate else "true tokens, decoded"] = decoded[shown_rows]
    real, steps = subject.features(pictures.images), len(RATES)

    def distances(keep: Tensor) -> list[float]:
        found = [frechet_distance_of_rows(real[keep], part[keep]) for part in features]
        wrong = [sum(found[start + 1 : start + steps]) / (steps - 1) for start in range(0, len(found), steps)]
        return [*found, *wrong, *(value - found[0] for value in wrong)]

    found = jackknife(distances, groups_of(count, seed))
    draws = bootstrap_weights(count, seed, "forgiveness") @ torch.stack(compared, 2)  # (2, 1 + R, kinds * rates)
    perceptual, error = intervals(draws[0]), intervals(psnr_of(draws[1]))
    name, added = subject.network.name, dict(zip(kinds, found[-len(kinds) :], strict=True))
    numbers = {f"rFD({name}), true tokens": found[0]}
    for index, kind in enumerate(kinds):
        numbers[f"pFD({name}), mean over the rates, {kind}"] = found[len(kinds) * steps + index]
        numbers[f"the same above rFD({name}), {kind}"] = added[kind]
        for i, rate in enumerate(RATES[1:], index * steps + 1):
            numbers[f"FD({name}), {rate:.0%} {kind}"] = found[i]
            numbers[f"PSNR in dB, {rate:.0%} {kind}"] = error[i]

    def figure(what: str, values: Sequence[Interval]) -> Figure:
        curves = [Curve(kind, RATES, values[i * steps : (i + 1) * steps]) for i, kind in enumerate(kinds)]
        return Figure(f"{what} over wrong tokens", "share of tokens replaced", what, curves)

    return Finding(
        f"Decoded from true tokens the pictures score {found[0].text} (Fréchet distance to themselves); wrong tokens "
        f"add {added['any code'].text} where they are any code and {added[near].text} where they are near the true "
        f"one, on average over rates from {RATES[1]:.0%} to {RATES[-1]:.0%}. The less, the more is forgiven.",
        numbers,
        [figure(f"FD({name})", found), figure("PSNR in dB", error), figure("Perceptual distance", perceptual)],
        protocol=protocol_line(
            f"each time {count:,} reconstructions by {subject.tokenizer.name}",
            name,
            pictures.name,
            {"originals": count},
        ),
        pictures=shown,
    )


def attribution(subject: Subject) -> Finding | str:
    """The Fréchet distance of free draws to other real pictures, as a sum of what each step adds."""
    if subject.others is None or len(subject.others.images) < 8:
        return "there are too few other pictures of the data to compare with"
    pictures, seed = subject.held_out, subject.settings.seed
    none = torch.zeros_like(pictures.tokens, dtype=torch.bool)
    sets = {
        "real pictures": pictures.images,
        "true tokens, decoded": subject.decode(pictures.tokens),
        "drawn under true context": subject.decode(forcing.forced_draws(subject)),
        "drawn freely": subject.decode(forcing.completed(subject, none[None])[0]),
    }
    features, others = [subject.features(images) for images in sets.values()], subject.features(subject.others.images)

    def distances(keep: Tensor) -> list[float]:
        found = [frechet_distance_of_rows(part[keep], others) for part in features]
        return [*found, *(after - before for before, after in pairwise(found)), found[3] - found[1]]

    found, name = jackknife(distances, groups_of(len(pictures.tokens), seed)), subject.network.name
    numbers = {f"FD({name}), {which}": interval for which, interval in zip(sets, found, strict=False)}
    decoder, single, free, gap = found[4:]
    numbers |= {
        "added by the tokenizer": decoder, "added by single draws under true context": single,
        "added by drawing freely": free, "gFD - rFD: free draws above true tokens": gap,
    }  # fmt: skip
    steps = ", ".join(f"{i} {which}" for i, which in enumerate(sets))
    words = resolved(free, "costs", "takes back", "does not resolvably change it:")
    return Finding(
        f"Free draws are {gap.text} farther from other real pictures than true tokens decoded. Of it, drawing each "
        f"token under true context adds {single.text}, and the generator's own context {words} {free.text}; the "
        f"tokenizer itself adds {decoder.text} to the {found[0].text} between real pictures. Compared with "
        f"{len(subject.others.images)} pictures of {subject.others.name}.",
        numbers,
        [Figure("Distance to other real pictures", steps, f"FD({name})", [Curve("all", range(4), found[:4])])],
        protocol=protocol_line(
            f"each time {len(pictures.tokens):,} pictures", name, subject.others.name,
            {"others": len(subject.others.images)},
        ),
        pictures={which: images[subject.shown.numpy()] for which, images in sets.items()},
    )  # fmt: skip
