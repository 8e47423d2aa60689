"""What the numbers of the page mean beside the verdicts, in plain sentences that are computed, not written."""

from __future__ import annotations

from collections.abc import Sequence

from consonar.report.post_training import training_finding
from consonar.report.records import Run, listed, measurement_text, verdict

LISTED_RUNS = 4
"""Of more runs than this the ends alone are said: a sentence of twelve numbers is not read."""


def findings(runs: Sequence[Run]) -> list[str]:
    """Plain sentences about what the numbers mean, each computed; one where nothing was measured."""
    if any(run.results and any(row.held_out_fd for row in run.results.rows) for run in runs):
        return [*training_finding(runs), copy_finding(runs)]
    if said := training_finding(runs):
        return [*said, "No samples were evaluated, and a better reward is not yet a better picture."]
    losses = [(run.name, *last) for run in runs if (last := run.last("validation/cross_entropy"))]
    if losses:
        return _cross_entropy_findings(losses)
    if any(run.reconstruction or run.last("validation/psnr") for run in runs):
        return _tokenizer_findings(runs)
    return ["Nothing has been measured in these run folders yet."]


def copy_finding(runs: Sequence[Run]) -> str:
    """How much of the runs' samples, each at its best setting, are copies of training images."""
    best = {run.name: row for run in runs if run.results and (row := run.results.best_row)}
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
    text = (
        f"At their best settings {shares} samples lie nearer to a training image than any held-out image does ({name})"
    )
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
