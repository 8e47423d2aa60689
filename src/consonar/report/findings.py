"""What the numbers of the page mean, in plain sentences that are computed, not written.

A difference of two scores is judged by the spread of the difference, sqrt(a^2 + b^2) for independent draws: up to one
of it is no difference, up to two a hint. The spread covers drawing again, never training again; the page says so.
A post-trained run is compared with the run that it started from, every other run with plain AR.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from consonar.report.post_training import control_finding, training_finding
from consonar.report.records import (
    Measurement,
    ResultRow,
    Run,
    find_start,
    listed,
    measurement_text,
    spread_of_difference,
    verdict,
)
from consonar.report.wording import Base, Pair, clauses, named

LISTED_RUNS = 4
"""Of more runs than this the values stand in the table alone: a sentence of twelve numbers is not read."""
ITS_START = Base("its start", "their starts")


def findings(runs: Sequence[Run]) -> list[str]:
    """Plain sentences about what the numbers mean, each computed; one where nothing was measured."""
    scored = [run for run in runs if run.results and any(row.held_out_fd for row in run.results.rows)]
    if scored:
        return _sampling_findings(scored)
    if said := training_finding(runs):
        return [*said, "No samples were evaluated, and a better reward is not yet a better picture."]
    losses = [(run.name, *last) for run in runs if (last := run.last("validation/cross_entropy"))]
    if losses:
        return _cross_entropy_findings(losses)
    if any(run.reconstruction or run.last("validation/psnr") for run in runs):
        return _tokenizer_findings(runs)
    return ["Nothing has been measured in these run folders yet."]


def _sampling_findings(runs: Sequence[Run]) -> list[str]:
    base = next((run for run in runs if run.method == "plain AR"), runs[0])
    bases = {run.name: start.name if (start := find_start(run, runs)) else base.name for run in runs}
    at_one = {
        run.name: row.held_out_fd
        for run in runs
        if run.results and (row := run.results.temperature_one) and row.held_out_fd
    }
    best = {run.name: row for run in runs if run.results and (row := run.results.best_row) and row.held_out_fd}
    starts = [run.name for run in runs if find_start(run, runs)]
    said = [_at_one_finding(base, bases, starts, at_one), _best_finding(bases, starts, at_one, best)]
    return [*said, *control_finding(runs), *training_finding(runs), _copy_finding(best)]


def _against(bases: Mapping[str, str], starts: Collection[str], scores: Mapping[str, Measurement]) -> list[str]:
    """Clauses that say how every run compares with its base, which is its start for those in `starts`."""
    brief = len(scores) > LISTED_RUNS
    pairs = [
        Pair(name, ITS_START if brief and name in starts else named(base), score, scores[base])
        for name, score in scores.items()
        if (base := bases[name]) != name and base in scores
    ]
    return clauses(pairs, brief=brief)


def _at_one_finding(
    base: Run, bases: Mapping[str, str], starts: Collection[str], at_one: Mapping[str, Measurement]
) -> str:
    if not at_one:
        return "No run was measured at temperature 1, the setting at which nothing but training differs."
    compared = _against(bases, starts, at_one)
    if len(at_one) > LISTED_RUNS:
        said = "; ".join(compared) or "the runs are not compared"
        return f"Sampled at temperature 1, by the Fréchet distance to held-out images (lower is closer), {said}."
    scores = listed([f"{measurement_text(measured)} for {name}" for name, measured in at_one.items()])
    text = f"Sampled at temperature 1, the Fréchet distance to held-out images (lower is closer) is {scores}"
    floor = base.results.noise_floor if base.results else None
    if not compared and floor is not None:
        compared = [f"real held-out images score {floor:.3g} against the training images, which is about the floor"]
    return "; ".join([text, *compared]) + "."


def _best_finding(
    bases: Mapping[str, str],
    starts: Collection[str],
    at_one: Mapping[str, Measurement],
    best: Mapping[str, ResultRow],
) -> str:
    scores = {name: row.held_out_fd for name, row in best.items() if row.held_out_fd}
    if not scores:
        return "No best temperature is recorded, so how much of a difference is mere sharpness stays open."
    said = listed([f"{measurement_text(m)} for {n} (temperature {best[n].temperature:.4g})" for n, m in scores.items()])
    text = f"{'With each' if len(scores) > 1 else 'With the'} model at its own best temperature"
    compared = [*_against(bases, starts, scores), *_sharpness(bases, at_one, scores)]
    rest = "; ".join([*compared, "a sharper model is not in itself a better one"]) + "."
    return f"{text}, {rest}" if len(scores) > LISTED_RUNS else f"{text} the distance is {said}; {rest}"


def _sharpness(
    bases: Mapping[str, str], at_one: Mapping[str, Measurement], best: Mapping[str, Measurement]
) -> list[str]:
    """Clauses about what the best temperatures leave of the gaps to the bases that were seen at temperature 1."""
    groups: dict[str, list[str]] = {}
    for name in best:
        base = bases[name]
        if name == base or not {base, name} <= at_one.keys() or base not in best:
            continue
        if verdict(at_one[base], at_one[name]) in ("within", "open"):
            continue
        before, after = at_one[name].value - at_one[base].value, best[name].value - best[base].value
        change = math.hypot(
            spread_of_difference(at_one[base], at_one[name]) or 0.0, spread_of_difference(best[base], best[name]) or 0.0
        )
        sure = verdict(best[base], best[name])
        if sure == "within":
            kind = "temperature alone can give what temperature 1 showed"
        elif before * after < 0:
            kind = "the order of temperature 1 turned round"
        elif abs(before) - abs(after) > change:
            kind = "part of the gap at temperature 1 was sharpness, which temperature alone gives"
        elif sure == "clear":
            kind = "the gap at temperature 1 was not only a matter of sharpness"
        else:
            continue
        groups.setdefault(kind, []).append(f"{abs(before):.3g}" if len(best) == 2 else f"{abs(before):.3g} for {name}")
    return [f"{kind} ({listed(gaps)} there)" for kind, gaps in groups.items()]


def _copy_finding(best: Mapping[str, ResultRow]) -> str:
    # Of several copy rates the one that finds most copies: the others would hide them.
    names = sorted({n for row in best.values() for n in row.metrics if n.startswith("copy rate")})
    highest = {n: max(row.metrics[n].value for row in best.values() if n in row.metrics) for n in names}
    name = max(names, key=lambda n: highest[n], default=None)
    rates = {n: row.metrics[name] for n, row in best.items() if name in row.metrics} if name else {}
    if not rates:
        return "No copy rate was measured, so it stays open how much of any score is memory of the training images."
    low, high = (pick(rates.values(), key=lambda rate: rate.value) for pick in (min, max))
    shares = listed([f"{measurement_text(rate, percent=True)} of {n}'s" for n, rate in rates.items()])
    if len(rates) > LISTED_RUNS:
        ends = dict.fromkeys(measurement_text(rate, percent=True) for rate in (low, high))
        shares = f"{' to '.join(ends)} of a run's"
    text = f"At these settings {shares} samples lie nearer to a training image than any held-out image does ({name})"
    if len(rates) == 1:
        return f"{text}; the larger this share, the more of the score is memory rather than variety."
    sure = verdict(low, high)
    if sure == "within" or low.value == high.value:
        return f"{text}; copying does not tell the runs apart."
    most = listed([n for n, rate in rates.items() if rate.value == high.value])
    doubt = {"hint": ", though by less than two spreads", "open": ", though no spread was measured"}.get(sure, "")
    return f"{text}; highest for {most}{doubt}, so a good distance to the training images means less there."


def _tokenizer_findings(runs: Sequence[Run]) -> list[str]:
    psnr = [f"{value:.1f} dB for {name}" for name, value in _reconstruction_values(runs, "psnr")]
    usage = [f"{100 * value:.0f} % for {name}" for name, value in _reconstruction_values(runs, "usage")]
    return [
        f"Held-out images come back from tokens at a peak signal-to-noise ratio of {listed(psnr)}; higher is closer."
        if psnr
        else "How close reconstructions are was not measured.",
        f"The share of codes in use on held-out images is {listed(usage)}; an unused code is capacity lost."
        if usage
        else "How many codes are in use was not measured.",
        "This bounds every generator trained on these tokens: its samples cannot be finer than these reconstructions.",
    ]


def _reconstruction_values(runs: Sequence[Run], key: str) -> list[tuple[str, float]]:
    """[(run name, value)] from `reconstruction.json`, or from the last validation where that file lacks it."""
    values = []
    for run in runs:
        last = run.last(f"validation/{key}")
        if key in run.reconstruction:
            values.append((run.name, float(run.reconstruction[key])))
        elif last is not None:
            values.append((run.name, last[1]))
    return values


def _cross_entropy_findings(losses: Sequence[tuple[str, int, float]]) -> list[str]:
    said = listed([f"{value:.3f} for {name} at step {step:,}" for name, step, value in losses])
    low = min(losses, key=lambda loss: loss[2])[0]
    return [
        f"The last validation cross-entropy, in nats per token (lower predicts held-out tokens better), is {said}.",
        f"{low} is lowest, from one training each and without a spread, so a small gap means little."
        if len(losses) > 1
        else "One run alone says nothing about a method; compare it with a second one.",
        "No samples were evaluated, and a better prediction of tokens is not yet a better picture.",
    ]
