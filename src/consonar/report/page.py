"""What the report says: sentences, tables and picture grids computed from the runs, then rendered by Jinja2.

A difference of two scores is judged by the spread of the difference, sqrt(a^2 + b^2) for independent draws: up to one
of it is no difference, up to two a hint. The spread covers drawing again, never training again; the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from consonar.report import Measurement, ResultRow, Run, measurement_text, spread_of_difference, verdict
from consonar.report.charts import LOOKS, curve_charts, direction, frontier_charts, result_sections
from consonar.report.images import nearest_blocks, reconstruction_groups, sample_blocks, training_grids

HEADINGS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "l1": "mean absolute error",
    "num_images": "images measured",
    "usage": "codes used",
    "perplexity": "perplexity",
    "entropy": "entropy (nats)",
}


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """The page as one string of HTML; the same runs give the same string."""
    environment = Environment(
        loader=PackageLoader("consonar.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [run.name for run in runs]
    return environment.get_template("report.html.jinja").render(
        title=title or (f"Run {names[0]}" if len(runs) == 1 else f"{listed(names)}, compared"),
        runs=runs,
        looks=LOOKS,
        headings=HEADINGS,
        findings=findings(runs),
        not_evaluated=[run.name for run in runs if not run.results],
        reconstructions=reconstruction_groups(runs),
        samples=sample_blocks(runs),
        nearest=nearest_blocks(runs),
        grids=training_grids(runs),
        columns=(columns := result_columns(runs)),
        sections=result_sections(runs, columns),
        frontier=frontier_charts(runs),
        curves=curve_charts(runs),
        config=config_rows(runs),
        provenance=[provenance_items(run) for run in runs],
        openmoji=any(uses_openmoji(run) for run in runs),
    )


def findings(runs: Sequence[Run]) -> list[str]:
    """Three plain sentences about what the numbers mean, each computed; one where nothing was measured."""
    scored = [run for run in runs if run.results and any(row.held_out_fd for row in run.results.rows)]
    if scored:
        return _sampling_findings(scored)
    losses = [(run.name, *last) for run in runs if (last := run.last("validation/cross_entropy"))]
    if losses:
        return _cross_entropy_findings(losses)
    if any(run.reconstruction or run.last("validation/psnr") for run in runs):
        return _tokenizer_findings(runs)
    return ["Nothing has been measured in these run folders yet."]


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _sampling_findings(runs: Sequence[Run]) -> list[str]:
    base = next((run for run in runs if run.method == "plain AR"), runs[0])
    at_one = {
        run.name: row.held_out_fd
        for run in runs
        if run.results and (row := run.results.temperature_one) and row.held_out_fd
    }
    best = {run.name: row for run in runs if run.results and (row := run.results.best_row) and row.held_out_fd}
    return [_at_one_finding(base, at_one), _best_finding(base, at_one, best), _copy_finding(best)]


def _against(base: str, scores: Mapping[str, Measurement]) -> list[str]:
    """Clauses that say how every other run compares with `base`, grouped by how sure that is; lower is better."""
    if base not in scores:
        return []
    groups: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for name, score in scores.items():
        if name != base:
            spread = spread_of_difference(scores[base], score)
            size = f"{abs(score.value - scores[base].value):.3g}"
            size += "" if spread is None else f" (spread of the difference {spread:.2g})"
            key = (verdict(scores[base], score), score.value < scores[base].value)
            groups.setdefault(key, []).append((name, size))
    clauses = []
    for (sure, ahead), members in groups.items():
        names, sizes = listed([name for name, _ in members]), listed([size for _, size in members])
        leads = f"{names} {'is' if len(members) == 1 else 'are'} {'ahead of' if ahead else 'behind'} {base} by {sizes}"
        clauses.append(
            {
                "within": f"{names} cannot be told from {base}: the difference, {sizes}, is smaller than its spread",
                "hint": f"{leads}, less than twice that spread: a hint, not a result",
                "clear": f"{leads}, more than twice that spread",
                "open": f"{leads}, but no spread was measured, so it is open whether this is chance",
            }[sure]
        )
    return clauses


def _at_one_finding(base: Run, at_one: Mapping[str, Measurement]) -> str:
    if not at_one:
        return "No run was measured at temperature 1, the setting at which nothing but training differs."
    scores = listed([f"{measurement_text(measured)} for {name}" for name, measured in at_one.items()])
    text = f"Sampled at temperature 1, the Fréchet distance to held-out images (lower is closer) is {scores}"
    clauses = _against(base.name, at_one)
    floor = base.results.noise_floor if base.results else None
    if not clauses and floor is not None:
        clauses = [f"real held-out images score {floor:.3g} against the training images, which is about the floor"]
    return "; ".join([text, *clauses]) + "."


def _best_finding(base: Run, at_one: Mapping[str, Measurement], best: Mapping[str, ResultRow]) -> str:
    scores = {name: row.held_out_fd for name, row in best.items() if row.held_out_fd}
    if not scores:
        return "No best temperature is recorded, so how much of a difference is mere sharpness stays open."
    said = listed([f"{measurement_text(m)} for {n} (temperature {best[n].temperature:g})" for n, m in scores.items()])
    text = f"{'With each' if len(scores) > 1 else 'With the'} model at its own best temperature the distance is {said}"
    clauses = _against(base.name, scores) + _sharpness(base.name, at_one, scores)
    return "; ".join([text, *clauses, "a sharper model is not in itself a better one"]) + "."


def _sharpness(base: str, at_one: Mapping[str, Measurement], best: Mapping[str, Measurement]) -> list[str]:
    """Clauses about what the best temperatures leave of the gaps to `base` that were seen at temperature 1."""
    groups: dict[str, list[str]] = {}
    for name in best:
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
    shares = listed([f"{measurement_text(rate, percent=True)} of {n}'s" for n, rate in rates.items()])
    text = f"At these settings {shares} samples lie nearer to a training image than any held-out image does ({name})"
    low, high = (pick(rates.values(), key=lambda rate: rate.value) for pick in (min, max))
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


def result_columns(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One {"metric", "heading", "hint"} per metric that any run measured, in the order of the first file."""
    metrics = dict.fromkeys(name for run in runs if run.results for row in run.results.rows for name in row.metrics)
    hints = {-1: "lower is better", 1: "higher is better", 0: ""}
    # Fréchet distances last would hide the main number on a phone; the held-out one leads.
    first = sorted(metrics, key=lambda name: not (name.startswith("FD(") and name.endswith(" validation")))
    return [{"metric": m, "heading": HEADINGS.get(m, m), "hint": hints[direction(m)]} for m in first]


def config_rows(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """The configurations as [(dotted key, value per run)], split into what "differs" between runs and the "same"."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, "not set") for config in flat]) for key in keys]
    return {
        "differs": [row for row in rows if len(set(row[1])) > 1],
        "same": [row for row in rows if len(set(row[1])) == 1],
    }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"loop": {"steps": 900}} -> {"loop.steps": "900"}: leaves as JSON, lists whole."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def provenance_items(run: Run) -> dict[str, str]:
    """Where one run's numbers come from: method, steps and training time, then all of `results.json` but its rows."""
    items = {"method": run.method}
    if run.metrics:
        items["last step"] = f"{run.metrics[-1]['step']:,}"
        if "time" in run.metrics[-1]:
            items["training time"] = f"{run.metrics[-1]['time'] / 60:.1f} min"
    return items | (flatten(run.results.provenance) if run.results else {})


def uses_openmoji(run: Run) -> bool:
    """Whether the run's data, tokenizer or reference names OpenMoji, whose licence asks for attribution."""
    named = [run.config.get("data"), run.config.get("tokenizer"), run.config.get("recipe")]
    reference = run.results.provenance.get("reference") if run.results else None
    return "openmoji" in json.dumps([*named, reference]).lower()
