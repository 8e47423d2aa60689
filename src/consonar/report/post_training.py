"""The page's part about post-training: VA-pi and its controls, each beside the model that it started from.

They have few steps of their own, so they get charts of their own. Validation at step 0 is that of the start model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from consonar.report.charts import CURVES, NOT_DRAWN, curve_chart, logged_keys
from consonar.report.records import Run, listed
from consonar.training.objectives import method_of

CHARTS = {
    "validation/reward": "Validation reward (weighted sum)",
    "train/reward": "Training reward (mean of the draws)",
    "validation/kl": "KL to the start model (nats per token)",
    "validation/entropy": "Validation entropy (nats per token)",
    "train/entropy": "Training entropy (nats per token)",
    "train/clip_fraction": "Clip fraction (share of ratios)",
    "train/ratio_deviation": "Largest deviation of the ratio from 1",
    "validation/cross_entropy": CURVES["validation/cross_entropy"],
    "validation/accuracy": CURVES["validation/accuracy"],
    "train/kl": "KL term in training (nats per token)",
    "train/soft_cross_entropy": "Training cross-entropy against soft targets (nats per token)",
}
MINUS = "\u2212"
RATIO = {"train/clip_fraction", "train/ratio_deviation"}
POLICY_LOSS = "train/policy"
"""Not drawn: minus the mean advantage while the ratio is 1, about 0 whatever is learnt; only its gradient matters."""
COLUMNS = {
    "validation/reward": ("reward", "higher is better"),
    "validation/kl": ("KL to the start", ""),
    "validation/entropy": ("entropy", ""),
    "validation/cross_entropy": ("cross-entropy", "lower is better"),
    "validation/accuracy": ("accuracy", "higher is better"),
}


def post_training_section(runs: Sequence[Run]) -> dict[str, Any] | None:
    """{"indices", "methods", "columns", "keeps_best", "rows", "notes", "charts"}; None without such a run."""
    entries = [(index, run) for index, run in enumerate(runs) if run.post_trains]
    if not entries:
        return None
    chosen = [run for _, run in entries]
    logged = logged_keys(entries)
    columns = {key: heading for key, heading in _columns(logged).items() if key in logged}
    rows = [row for run in chosen if (row := method_of(run.objective))]
    return {
        "indices": [index for index, _ in entries],
        "methods": dict.fromkeys((row.name, row.about) for row in rows),
        "columns": list(columns.values()),
        "keeps_best": any(run.best_model for run in chosen),
        "rows": [_row(index, run, columns) for index, run in entries],
        "notes": [*_end_notes(chosen), *_reading_notes(chosen)],
        "charts": _charts(entries),
    }


def _columns(logged: set[str]) -> dict[str, tuple[str, str]]:
    distances = sorted(key for key in logged if key.startswith("validation/FD("))
    return COLUMNS | {key: (key.removeprefix("validation/"), "lower is better") for key in distances}


def _row(index: int, run: Run, columns: Iterable[str]) -> dict[str, Any]:
    """{"index", "run", "steps", "best", "cells"}: from the start model to the end."""
    steps = f"{run.metrics[-1]['step']:,}" if run.metrics else "0"
    steps += ", stopped" if run.stopped else ""
    return {
        "index": index,
        "run": run,
        "steps": steps,
        "best": f"{run.best_model['step']:,}" if run.best_model else "–",
        "cells": [_from_to(run, key) for key in columns],
    }


def _from_to(run: Run, key: str) -> str:
    """ "-0.5120 → -0.4983": the value at step 0, where it was logged, and the last one, to equal places."""
    series = run.series(key)
    if not series:
        return "–"
    values = [series[-1][1]] if key == "validation/kl" or series[0][0] != 0 else [series[0][1], series[-1][1]]
    largest = max(abs(value) for value in values)
    places = 4 if largest == 0 else min(4, max(0, 3 - math.floor(math.log10(largest))))
    return " → ".join(f"{value:.{places}f}".replace("-", MINUS) for value in values)


def _end_notes(runs: Sequence[Run]) -> list[str]:
    """How runs ended: stopped by the guard, and what their best step means."""
    notes = []
    for run in runs:
        if run.stopped is not None:
            text = f"{run.name} was stopped by its guard at step {run.stopped['step']:,}: {run.stopped['reason']}."
            last = run.metrics[-1]["step"] if run.metrics else 0
            notes.append(text + (f" It was resumed later, to step {last:,}." if last > run.stopped["step"] else ""))
    if metrics := dict.fromkeys(run.best_model["metric"] for run in runs if run.best_model):
        notes.append(
            f"The best step is that of the lowest {listed(list(metrics))} on the way (ringed below; step 0 is the "
            "start model). That model is in best/; everything else on this page is about the last one."
        )
    return notes


def _reading_notes(runs: Sequence[Run]) -> list[str]:
    """What to know when reading the charts."""
    notes = []
    policies = [run for run in runs if "train/ratio_deviation" in logged_keys([(0, run)])]
    if policies and not _moves_ratio(runs):
        notes.append("Each draw serves one update, so the probability ratio is exactly 1 and nothing is clipped.")
    if len({str(run.objective.get("rewards")) for run in runs}) > 1:
        notes.append("The weights of the rewards differ between runs: compare the parts, not the sum.")
    noisy = [run.name for run in runs if any(line.get("train/noise_rate", 0) > 0 for line in run.metrics)]
    if noisy:
        notes.append(f"Training values of {listed(noisy)} are under a noisy context; validation never is.")
    return notes


def _moves_ratio(runs: Sequence[Run]) -> bool:
    return any(run.objective.get("inner_epochs", 1) > 1 for run in runs)


def _charts(entries: Sequence[tuple[int, Run]]) -> list[dict[str, str]]:
    logged = logged_keys(entries)
    validated = "validation/reward" in logged
    parts = {key for key in logged if key.startswith(("validation/reward_", "train/reward_"))}
    shown_parts = sorted(key for key in parts if key.startswith("validation/" if validated else "train/"))
    titles = {
        key: f"{'Validation' if validated else 'Training'} reward: {key.partition('_')[2]}" for key in shown_parts
    }
    total = "validation/reward" if validated else "train/reward"
    order = {total: CHARTS[total], **titles, **CHARTS}
    hidden = NOT_DRAWN | parts | {POLICY_LOSS} | (set() if _moves_ratio([run for _, run in entries]) else RATIO)
    drawn = [key for key in order if key in logged and (key not in hidden or key in titles)]
    drawn += sorted(logged - hidden - order.keys())
    ringed = {
        f"validation/{run.best_model['metric']}": {
            (index, float(other.best_model["step"])) for index, other in entries if other.best_model is not None
        }
        for _, run in entries
        if run.best_model is not None
    }
    return [
        curve_chart(entries, key, order.get(key, _title(key)), prefix="post", ringed=ringed.get(key, ()))
        for key in drawn
    ]


def _title(key: str) -> str:
    if key.startswith("validation/FD("):
        return f"{key.removeprefix('validation/')}, of samples on the way"
    return CURVES.get(key, key)


def training_finding(runs: Sequence[Run]) -> list[str]:
    """At most one sentence: how far the logs of post-trained runs say that reward and entropy moved."""
    keys = ("validation/reward", "validation/entropy")
    chosen = [run for run in runs if run.post_trains and all(len(run.series(key)) > 1 for key in keys)]
    if not chosen:
        return []
    reward, entropy = (listed([f"{_change(run, key)} ({run.name})" for run in chosen]) for key in keys)
    return [
        f"From the start model to the end, the reward on held-out images moved by {reward}, higher being better, and "
        f"the entropy under the true context by {entropy} nats per token; a model of lower entropy is a "
        "sharper one, which a lower temperature gives as well."
    ]


def _change(run: Run, key: str) -> str:
    series = run.series(key)
    return f"{series[-1][1] - series[0][1]:+#.2g}".rstrip(".").replace("-", MINUS)
