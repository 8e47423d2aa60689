"""Amplified exposure bias (reAR, arXiv 2510.04450, Figure 3a), and how much of it is the context.

Of every picture a share of tokens is true, either the first ones (prefix) or as many at random places (interleaved);
the generator draws the others from left to right, and what is decoded is compared with the decoded true tokens. At
equal numbers of true tokens, interleaved above prefix is called exposure bias.

Beyond the article: the two protocols also place their wrong tokens differently, half a picture against all of it, and
a perceptual distance may weigh that. So each is drawn a second time at the same places by the same random numbers under
the *true* tokens; what a protocol is worse than that is the context alone.

Letters: `n` pictures, `N` tokens, `R` resamples, `K` shares of true tokens.
"""

import torch
from torch import Tensor

from consonar.diagnostics import forcing
from consonar.diagnostics.findings import Curve, Figure, Finding, Interval, resolved
from consonar.diagnostics.statistics import bootstrap_weights, interpolated, intervals
from consonar.diagnostics.subject import Subject
from consonar.metrics.pixels import psnr_of
from consonar.seeding import generator, uniform

RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
PROTOCOLS = ("prefix", "interleaved")
BESIDE = ", drawn under true context"


def true_positions(protocol: str, ratio: float, order: Tensor) -> Tensor:
    """Which tokens are given, (n, N) bool, the same number in every row: the first ones (`prefix`), or those that come
    first in `order` (n, N), a random order of the positions of each picture (`interleaved`)."""
    length = order.shape[1]
    places = torch.arange(length).expand_as(order) if protocol == "prefix" else order
    return places < round(ratio * length)


def gap_at_equal_share(prefix: tuple[Tensor, Tensor], interleaved: tuple[Tensor, Tensor]) -> Tensor:
    """(R, K): how far interleaved lies above the prefix curve at its own share of correct tokens.

    Each is (shares, distances), (R, K) by rising share; the prefix curve ends where all tokens are right and the
    distance is 0.
    """
    shares = torch.cat([prefix[0], torch.ones_like(prefix[0][:, :1])], 1)
    distances = torch.cat([prefix[1], torch.zeros_like(prefix[1][:, :1])], 1)
    return interleaved[1] - interpolated(interleaved[0], shares, distances)


def measured(subject: Subject) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By protocol, and by protocol + `BESIDE`: perceptual distance, squared error and share of correct tokens of each
    picture, (3, n, K); and the tokens (n, N) at the middle share."""
    tokens = subject.held_out.tokens
    order = uniform(generator(subject.settings.seed, "diagnosis", "interleaved"), *tokens.shape).argsort(1).argsort(1)
    forced, truth = forcing.forced_draws(subject), subject.decode(tokens)
    # Without true tokens both protocols are one.
    cases = [("prefix", 0.0), *((protocol, ratio) for protocol in PROTOCOLS for ratio in RATIOS[1:])]
    keep = torch.stack([true_positions(*case, order) for case in cases])
    drawn = dict(zip(cases, forcing.completed(subject, keep), strict=True))
    drawn |= {
        (protocol + BESIDE, ratio): torch.where(kept, tokens, forced)
        for (protocol, ratio), kept in zip(cases, keep, strict=True)
    }
    found = {}
    for case, sequences in drawn.items():
        right = (sequences == tokens).double().mean(1)
        found[case] = torch.stack([*subject.compare(subject.decode(sequences), truth), right])
    names = [*PROTOCOLS, *(protocol + BESIDE for protocol in PROTOCOLS)]
    first = {name: name.replace("interleaved", "prefix") for name in names}
    return (
        {name: torch.stack([found[name if ratio else first[name], ratio] for ratio in RATIOS], 2) for name in names},
        {name: drawn[name, 0.5] for name in names},
    )


def exposure_bias(subject: Subject) -> Finding:
    """The curves of Figure 3a with the same draws under true context beside them, and what lies between."""
    found, middle = measured(subject)
    weights = bootstrap_weights(len(subject.held_out.tokens), subject.settings.seed, "exposure")
    draws = {name: weights @ values for name, values in found.items()}  # (3, 1 + R, K) each
    (below, _, share), (above, _, other_share) = (draws[protocol] for protocol in PROTOCOLS)
    equal_ratio = intervals((above - below)[:, 1:])
    equal_share = intervals(gap_at_equal_share((share, below), (other_share, above))[:, 1:])
    context = {name: intervals((draws[name][0] - draws[name + BESIDE][0])[:, 1:]) for name in PROTOCOLS}
    numbers = {}
    for i, ratio in enumerate(RATIOS[1:]):
        numbers[f"interleaved above prefix, {ratio:.0%} true"] = equal_ratio[i]
        numbers[f"the same at an equal share of correct tokens, {ratio:.0%} true"] = equal_share[i]
        for name, gaps in context.items():
            numbers[f"own context above true context, {name}, {ratio:.0%} true"] = gaps[i]

    def curves(values: dict[str, Tensor]) -> list[Curve]:
        return [
            Curve(name, draws[name][2, 0].tolist(), intervals(of), name.removesuffix(BESIDE) if BESIDE in name else "")
            for name, of in values.items()
        ]

    x = "share of correct tokens"
    distances = {name: values[0] for name, values in draws.items()}
    decibels = {name: psnr_of(values[1]) for name, values in draws.items()}
    rows = {"true tokens, decoded": subject.held_out.tokens} | {f"half true, {name}": middle[name] for name in middle}
    return Finding(
        summary(equal_ratio, equal_share, context),
        numbers,
        (
            Figure("Prefix against interleaved", x, "perceptual distance", curves(distances)),
            Figure("The same in pixels", x, "PSNR, dB", curves(decibels)),
        ),
        pictures={name: subject.decode(tokens[subject.shown]) for name, tokens in rows.items()},
    )


def summary(equal_ratio: list[Interval], equal_share: list[Interval], context: dict[str, list[Interval]]) -> str:
    """What the gaps say, each of K - 1 shares of true tokens."""
    half = RATIOS[1:].index(0.5)

    def where(gaps: list[Interval], sign: int) -> str:
        found = [f"{ratio:.0%}" for ratio, gap in zip(RATIOS[1:], gaps, strict=True) if gap.sign == sign]
        return f"at {', '.join(found)}" if found else "nowhere"

    of_context = context["interleaved"][half]
    cause = resolved(of_context, "adds", "takes away", "does not resolvably change it:")
    return (
        f"At equal shares of true tokens interleaved context is resolvably worse than a true prefix "
        f"{where(equal_ratio, 1)}, better {where(equal_ratio, -1)} (the article: worse throughout); at equal shares of "
        f"correct tokens worse {where(equal_share, 1)}, better {where(equal_share, -1)}. With half of them true, "
        f"interleaved less prefix is {equal_ratio[half].text}; against draws at the same places under true tokens, the "
        f"generator's own context {cause} {of_context.text} (interleaved), {context['prefix'][half].text} (prefix)."
    )
