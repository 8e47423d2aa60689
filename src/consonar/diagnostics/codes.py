"""Diagnostics of the codebook: wrong tokens near the true one, and what the decoder makes of near codes.

Embedding unawareness (reAR, arXiv 2510.04450, Figure 3b): of the tokens drawn under true context, a wrong one is
replaced with a probability by the wrong code that is nearest by cosine to the true one. No more tokens are right than
before; if the pictures get better, the loss on token ids is blind to something that the decoder sees.

Letters: `n` pictures, `N` tokens, `V` codes, `C` code width, `M` codes asked about, `K` neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from consonar.diagnostics import forcing
from consonar.diagnostics.findings import Curve, Figure, Finding, count_of, exactly, resolved
from consonar.diagnostics.statistics import bootstrap_weights, intervals, rank_correlation, ratio
from consonar.diagnostics.subject import Subject
from consonar.metrics.pixels import psnr_of
from consonar.seeding import generator, integers, permutation, uniform
from consonar.tokenizers import quantizer
from consonar.training.objectives.base import codebook_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
NEIGHBOURS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
"""Which neighbours of a code are put in its place: those that there are, the middle one and the farthest."""
ASKED = 1024
"""Codes whose distances are measured, drawn from the codebook."""
PLACES = 2
"""Tokens of each picture that are replaced, one at a time."""
BLOCK = 2**24
"""Distances that are held at a time."""


def neighbours(codebook: Tensor, codes: Tensor, nth: list[int], *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """The `nth` nearest other codes (1: the nearest) of codes (M,): ids and distances, (M, K), on the CPU.

    Euclidean distances in the codebook (V, C), or with `cosine` of its codes at length 1.
    """
    table = F.normalize(codebook, dim=1) if cosine else codebook
    ids, distances = [], []
    for part in codes.to(codebook.device).split(max(1, BLOCK // len(table))):
        squared = quantizer.squared_distances(table[part], table).clamp(min=0)
        squared[torch.arange(len(part)), part] = torch.inf  # a code is not its own neighbour
        found = squared.topk(max(nth), largest=False)
        ids.append(found.indices[:, [n - 1 for n in nth]].cpu())
        distances.append(found.values[:, [n - 1 for n in nth]].sqrt().double().cpu())
    return torch.cat(ids), torch.cat(distances)


def replace_wrong(drawn: Tensor, tokens: Tensor, nearest: Tensor, share: float, uniforms: Tensor) -> Tensor:
    """(n, N): where a drawn token is wrong and its number in [0, 1) is below `share`, the code `nearest` to the true
    one; all (n, N)."""
    return torch.where((drawn != tokens) & (uniforms < share), nearest, drawn)


def embedding_unawareness(subject: Subject) -> Finding:
    """Figure 3b of reAR."""
    tokens, seed = subject.held_out.tokens, subject.settings.seed
    codebook = codebook_of(subject.tokenizer, subject.device)
    used, places = tokens.unique(return_inverse=True)
    nearest = neighbours(codebook, used, [1], cosine=True)[0][:, 0][places]
    drawn, truth = forcing.forced_draws(subject), subject.decode(tokens)
    chances = uniform(generator(seed, "diagnosis", "replacement"), *tokens.shape)
    table, columns = F.normalize(codebook, dim=1).cpu(), []
    for share in SHARES:
        replaced = replace_wrong(drawn, tokens, nearest, share, chances)
        likeness = (table[replaced] * table[tokens]).sum(2).mean(1).double()
        right = (replaced == tokens).double().mean(1)
        columns.append(torch.stack([*subject.compare(subject.decode(replaced), truth), likeness, right]))
    distance, error, cosine, right = bootstrap_weights(len(tokens), seed, "replacement") @ torch.stack(columns, 2)
    error = psnr_of(error)
    ends = {
        "perceptual distance, all replaced above none": distance[:, -1] - distance[:, 0],
        "PSNR gained, dB": error[:, -1] - error[:, 0],
        "mean cosine of codes to the true ones, gained": cosine[:, -1] - cosine[:, 0],
        "share of correct tokens": right[:, 0],
    }
    numbers = dict(zip(ends, intervals(torch.stack([*ends.values()], 1)), strict=True))
    fall, *_, correct = numbers.values()
    relative = ratio(distance[:, -1:] - distance[:, :1], distance[:, :1])
    if relative:
        numbers = {next(iter(numbers)): fall, "the same, relative": relative} | numbers
    of_it = f", {relative.text} of it" if relative else ""
    steps = count_of(intervals(distance.diff(dim=1)), lambda step: step.sign < 0)
    x, draws = "share of wrong tokens replaced", "draws under true context"
    rows = {
        "true tokens, decoded": tokens, draws: drawn,
        "wrong tokens replaced by the nearest": replace_wrong(drawn, tokens, nearest, 1.0, chances),
    }  # fmt: skip
    return Finding(
        f"With all wrong tokens replaced by the code nearest to the true one, the perceptual distance "
        f"{resolved(fall, 'rises', 'falls', 'does not resolvably change')}: the change is {fall.text}{of_it}, "
        f"with {correct.text} of the tokens correct as before. It falls beyond its interval in {steps} steps.",
        numbers,
        (
            Figure(
                "Distance over the share replaced",
                x,
                "perceptual distance",
                [Curve(draws, SHARES, intervals(distance))],
            ),
            Figure("The same in pixels", x, "PSNR, dB", [Curve(draws, SHARES, intervals(error))]),
            Figure("What the codes say", x, "mean cosine to the true codes", [Curve(draws, SHARES, intervals(cosine))]),
        ),
        pictures={name: subject.decode(of[subject.shown]) for name, of in rows.items()},
    )


def changes(subject: Subject, codebook: Tensor, nth: list[int], rng: torch.Generator) -> Tensor:
    """(3, n, K * PLACES): distance in the codebook, squared change of pixels and perceptual distance where a token of a
    picture, at a place that is drawn, becomes its `nth` (K) nearest code; place after place."""
    tokens, rows = subject.held_out.tokens, torch.arange(len(subject.held_out.tokens))
    truth, found = subject.decode(tokens), []
    for _ in range(PLACES):
        place = integers(rng, 0, tokens.shape[1], len(tokens))
        others, far = neighbours(codebook, tokens[rows, place], nth)  # (n, K)
        for column in range(len(nth)):
            changed = tokens.clone()
            changed[rows, place] = others[:, column]
            perceptual, error = subject.compare(subject.decode(changed), truth)
            found.append(torch.stack([far[:, column], error, perceptual]))
    return torch.stack(found, 2)


def neighbourhoods(subject: Subject) -> Finding:
    """How far codes are from each other, how many are used, and what a picture loses when a token is its neighbour."""
    tokens, seed, size = subject.held_out.tokens, subject.settings.seed, subject.tokenizer.vocab_size
    codebook = codebook_of(subject.tokenizer, subject.device)
    rng, middle = generator(seed, "diagnosis", "codes"), max(1, size // 2)
    nth = sorted({*(n for n in NEIGHBOURS if n < size), middle, size - 1})
    asked = permutation(rng, size)[:ASKED]
    spacing = neighbours(codebook, asked, nth)[1]  # (M, K)
    found = changes(subject, codebook, nth, rng)
    weights, of_codes = bootstrap_weights(len(tokens), seed, "codes"), bootstrap_weights(len(asked), seed, "spacing")
    (agreement,) = intervals(rank_correlation(found[0], found[1], weights)[:, None])
    draws = weights @ found.unflatten(2, (PLACES, len(nth))).mean(2)  # (3, 1 + R, K)
    _, error, seen = map(intervals, draws)
    times = ratio(draws[1, :, -1:], draws[1, :, :1])
    counts, distances = quantizer.code_counts(tokens, size), of_codes @ spacing
    to_middle = ratio(distances[:, :1], distances[:, nth.index(middle), None])
    said = "a token that becomes the nearest code changes too few pixels to compare others with."
    if times:
        said = f"a token that becomes the farthest code changes {times.text} times as many squared pixels as one that "
        said += "becomes the nearest."
    k, of_pictures = "k, the k-th nearest code", "one token of each picture"
    return Finding(
        f"Distance in the codebook and change of the picture have a rank correlation of {agreement.text}: {said} "
        f"{int((counts > 0).sum())} of {size} codes occur in these {len(tokens)} pictures.",
        {
            "rank correlation of code distance and squared pixel change": agreement,
            **({"squared pixel change, farthest over nearest code": times} if times else {}),
            "distance to the nearest code": intervals(distances)[0],
            **({"the same over the distance to the middle one": to_middle} if to_middle else {}),
            "share of the codes that occur": exactly(quantizer.usage(counts)),
            "perplexity of the codes": exactly(quantizer.perplexity(counts)),
        },
        (
            Figure("Where the neighbours are", k, "distance in the codebook",
                   [Curve("codes drawn from the codebook", nth, intervals(distances))], log=True),
            Figure("What a neighbour changes", k, "squared change of pixels",
                   [Curve(of_pictures, nth, error)], log=True),
            Figure("What of it is seen", k, "perceptual distance", [Curve(of_pictures, nth, seen)], log=True),
        ),
    )  # fmt: skip
