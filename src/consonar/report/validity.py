"""What was measured and must not be shown: of weights that have changed since, or measured otherwise than the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from consonar.evaluation.run_results import outdated
from consonar.files.readers import read_json
from consonar.report.records import ResultRow, Results, Run, listed

SETTINGS = ("num_neighbours", "max_neighbours_images", "copy_quantile", "draws")
"""Options of `evaluate` that a number depends on."""


def without_outdated(run: Run) -> Run:
    """The run without results and reconstructions of weights that it no longer has; a sentence says so of each."""
    said = []
    if run.results and (why := outdated(run.results.provenance, run.weights_sha256)):
        said.append(f"The results of {run.name} are not shown: they {why}.")
        run = replace(run, results=None)
    values = dict(run.reconstruction)
    if why := outdated_reconstruction(values.pop("origin", {}), run):
        said.append(f"The reconstructions of {run.name} are not shown: they {why}.")
        run, values = replace(run, reconstructs=False), {}
    return replace(run, reconstruction=values, withheld=(*run.withheld, *said))


def outdated_reconstruction(origin: Any, run: Run) -> str | None:
    """Why reconstruction.json is not of the tokenizer that `run` is, or reads its tokens with; else None."""
    if not isinstance(origin, Mapping):
        return "do not say what they are of; evaluate again with --overwrite"
    if "checkpoint_sha256" in origin:
        return outdated(origin, run.weights_sha256)
    config = run.path / "model" / "config.json"
    known = read_json(config).get("tokenizer_fingerprint") if config.is_file() else None
    measured = origin.get("tokenizer_fingerprint")
    if known is None or measured is None or known == measured:
        return None
    return "are of another tokenizer than the model's; evaluate again with --overwrite"


def without_old_matches(run: Run, runs: Sequence[Run]) -> Run:
    """The run without rows at the entropy of a run on the page that was trained on since."""
    if run.results is None:
        return run
    lost = [row for row in run.results.rows if _is_of_older_match(row, run, runs)]
    if not lost:
        return run
    rows = [row for row in run.results.rows if row not in lost]
    names = listed([str(row.matched_to) for row in lost])
    said = f"Rows of {run.name} at the entropy of {names} are not shown: {names} changed since; evaluate again."
    best = run.results.best_row
    results = Results(tuple(rows), rows.index(best) if best in rows else None, run.results.provenance)
    return replace(run, results=results if rows else None, withheld=(*run.withheld, said))


def _is_of_older_match(row: ResultRow, run: Run, runs: Sequence[Run]) -> bool:
    named = [other for other in runs if other is not run and other.path.name == row.matched_to]
    known = {other.weights_sha256 for other in named} - {None}
    return row.matched_sha256 is not None and bool(known) and row.matched_sha256 not in known


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs, without the results of those that were measured otherwise than the first one that has results."""
    first = next((run for run in runs if run.results), None)
    checked = []
    for run in runs:
        if first and first.results and run.results and (why := difference(run.results, first.results)):
            said = f"The results of {run.name} are not shown beside those of {first.name}: {why}; evaluate both alike."
            run = replace(run, results=None, withheld=(*run.withheld, said))
        checked.append(run)
    return checked


def difference(results: Results, others: Results) -> str | None:
    """Why the numbers of two results cannot be compared; None where they can."""
    ours, theirs = results.provenance, others.provenance
    counts = [sorted({row.num_samples for row in one.rows}) for one in (results, others)]
    if not same_reference(ours.get("reference"), theirs.get("reference")):
        return "they were measured against another reference"
    if ours.get("feature_network") != theirs.get("feature_network"):
        return "they were measured with another feature network"
    if counts[0] != counts[1]:
        here, there = (listed([f"{count:,}" for count in one]) for one in counts)
        return f"they are of {here} samples, those of {there}, and a Fréchet distance depends on that"
    changed = [key for key in SETTINGS if _setting(ours, key) != _setting(theirs, key)]
    return f"they were measured with other {listed(changed)}" if changed else None


def _setting(provenance: Mapping[str, Any], key: str) -> Any:
    config = provenance.get("config")
    return config.get(key) if isinstance(config, Mapping) else None


def same_reference(ours: Any, theirs: Any) -> bool:
    """Whether two descriptions of a reference are of one: of the same pixels, or where unknown of the same name."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return bool(ours == theirs)
    hashes = [{key: value for key, value in one.items() if key.endswith("_sha256")} for one in (ours, theirs)]
    if all(hashes):
        return hashes[0] == hashes[1]
    sizes = [{key: value for key, value in one.items() if not key.endswith("_sha256")} for one in (ours, theirs)]
    return sizes[0] == sizes[1]


def remarks(runs: Sequence[Run]) -> list[str]:
    """What must be known to read the numbers of the page, one sentence each: as measured, and of the temperatures."""
    measured = [(run, run.results) for run in runs if run.results]
    found = [result.provenance.get("remarks") for _, result in measured]
    said = list(dict.fromkeys(f"{line}." for lines in found if isinstance(lines, list) for line in lines))
    grids = {run.name: sorted({row.temperature for row in each.rows if not row.matched_to}) for run, each in measured}
    if len({tuple(grid) for grid in grids.values()}) > 1:
        text = "; ".join(f"{name} {listed([f'{value:g}' for value in grid])}" for name, grid in grids.items() if grid)
        said.append(f"The runs were measured at different temperatures, and the best is the best of these: {text}.")
    return said
