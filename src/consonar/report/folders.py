"""Reads run folders into records, and leaves out what must not be shown: numbers of other weights, or of another kind.

What is missing stays empty; what is there and broken is a `UserError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from consonar.config_io import adapter
from consonar.errors import UserError, reading
from consonar.evaluation.results import AGAIN, exported_sha256, outdated
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import beside, read_json
from consonar.files.writers import file_sha256
from consonar.json_types import Json
from consonar.report.records import ResultRow, Results, Run, listed
from consonar.training.objectives import completed, method_of
from consonar.training.origins import FILE
from consonar.training.tracking import read_metrics

MAX_RUNS = 8
COMPONENTS = ("model", "best")
"""Folders inside a run that another run can start from."""


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read 1 to 8 run folders, in the given order, and name each by its folder (with its parent's where two agree).

    Results of weights that have changed since, and results that cannot be compared with those of the first run, are
    left out; `withheld` says so.
    Raises `UserError` for another number, for one folder given twice, and for what is missing or broken in one.
    """
    if not 1 <= len(paths) <= MAX_RUNS:
        raise UserError(f"runs: {len(paths)} given; a report compares 1 to {MAX_RUNS} run folders")
    folders = [Path(path).resolve() for path in paths]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"runs: {twice[0]} is given more than once; name each run folder once")
    short = [folder.name for folder in folders]
    names = [f.name if short.count(f.name) == 1 else f"{f.parent.name}/{f.name}" for f in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [without_outdated(load_run(folder, name)) for folder, name in zip(folders, names, strict=True)]
    runs = [without_old_matches(run, runs) for run in runs]
    first = next((run for run in runs if run.results.rows), None)
    return [comparable(run, first) if first else run for run in runs]


def load_run(folder: Path, name: str) -> Run:
    if not (folder / "config.json").is_file():
        missing = "holds no config.json" if folder.is_dir() else "no such folder"
        raise UserError(f"run {folder}: {missing}; pass a folder that `consonar train` wrote")
    config = read_note(folder / "config.json", objective=(dict, NoneType), init=(str, NoneType))
    with reading(f"{folder / 'config.json'}: objective", "settings as training writes them"):
        objective = completed(config.get("objective") or {})
        row = method_of(objective)
    init = Path(config.get("init") or "")
    return Run(
        path=folder,
        name=name,
        config=config,
        objective=objective,
        row=row,
        metrics=tuple(read_metrics(folder / "metrics.jsonl")),
        results=read_results(folder / "results.json"),
        reconstruction=read_note(folder / "reconstruction.json"),
        start=(init.parent if init.name in COMPONENTS else init) if config.get("init") else None,
        starts_from_best=init.name == "best",
        origin=read_note(folder / FILE),
        weights_sha256=exported_sha256(folder),
        stopped=read_note(folder / "stopped.json", step=int, reason=str),
        best_model=read_note(folder / "best.json", step=int, metric=str, value=(int, float)),
    )


def read_note(path: Path, **entries: Any) -> Json:
    """A file of named entries of given types; empty where it is not there."""
    if not path.is_file():
        return {}
    note = read_json(path, "write it again or leave this run out")
    for key, kind in entries.items():
        if not isinstance(note.get(key), kind):
            raise UserError(f"{path}: {key} is {note.get(key)!r:.60}; expected {listed([*entries])} as training writes")
    return note


def read_results(path: Path) -> Results:
    if not path.is_file():
        return Results()
    content = {"schema": None, "rows": None, **read_note(path)}
    content["provenance"] = {key: content[key] for key in content if key not in ("rows", "best", "remarks")}
    try:
        results = adapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}, got {first['input']!r:.60}; {AGAIN}") from error
    if results.best is not None and not 0 <= results.best < len(results.rows):
        raise UserError(f"{path}: best is {results.best}; expected the index of a row, 0 to {len(results.rows) - 1}")
    return replace(results, rows=tuple(with_samples(path, number, row) for number, row in enumerate(results.rows)))


def with_samples(path: Path, number: int, row: ResultRow) -> ResultRow:
    """The row with the place of the pictures that it measured, which are checked to be these."""
    if row.samples is None:
        return row
    samples = path.parent / beside(path, str(row.samples))
    if not samples.is_file():
        raise UserError(f"{path}: rows[{number}] names {samples.name}, which is not there; sample again")
    if row.samples_sha256 not in (None, file_sha256(samples)):
        raise UserError(f"{path}: {samples.name} is not the file that rows[{number}] measured; {AGAIN}")
    return replace(row, samples=samples)


def withhold(run: Run, said: str, **changes: Any) -> Run:
    """The run with these changes, and the sentence that says so on the page."""
    return replace(run, withheld=(*run.withheld, said), **changes)


def without_outdated(run: Run) -> Run:
    """The run without results and reconstructions of weights that it no longer has."""
    if run.results.rows and (why := outdated(run.results.provenance, run.weights_sha256)):
        run = withhold(run, f"The results of {run.name} are not shown: they {why}.", results=Results())
    values = dict(run.reconstruction)
    origin = values.pop("origin", {})
    if why := outdated_reconstruction(origin, run):
        return withhold(run, f"The reconstructions of {run.name} are not shown: they {why}.", reconstruction={})
    if isinstance(origin, Mapping) and "protocol" in origin:
        said = origin.get("remarks")
        values["protocol"] = "; ".join(map(str, (origin["protocol"], *(said if isinstance(said, list) else ()))))
    return replace(run, reconstruction=values)


def outdated_reconstruction(origin: object, run: Run) -> str | None:
    """Why reconstruction.json is not of the tokenizer that `run` is, or reads its tokens with; else None."""
    if not isinstance(origin, Mapping):
        return f"do not say what they are of; {AGAIN}"
    if "checkpoint_sha256" in origin:
        return outdated(origin, run.weights_sha256)
    model = read_note(run.path / "model" / "config.json")
    known, measured = (one.get("tokenizer_fingerprint") for one in (model, origin))
    if known is None or measured is None or known == measured:
        return None
    return f"are of another tokenizer than the model's; {AGAIN}"


def without_old_matches(run: Run, runs: Sequence[Run]) -> Run:
    """The run without rows at the entropy of a run on the page that was trained on since."""

    def is_old(row: ResultRow) -> bool:
        named = [other for other in runs if other is not run and other.path.name == row.matched_to]
        known = {other.weights_sha256 for other in named} - {None}
        return row.matched_sha256 is not None and bool(known) and row.matched_sha256 not in known

    old = [str(row.matched_to) for row in run.results.rows if is_old(row)]
    if not old:
        return run
    rows = tuple(row for row in run.results.rows if not is_old(row))
    best = rows.index(run.results.best_row) if run.results.best_row in rows else None
    names = listed(old)
    said = f"Rows of {run.name} at the entropy of {names} are not shown: {names} changed since; {AGAIN}."
    return withhold(run, said, results=replace(run.results, rows=rows, best=best))


def comparable(run: Run, first: Run) -> Run:
    """The run, without its results where these were measured otherwise than those of the `first` that has any."""
    why = difference(run.results, first.results) if run.results.rows else None
    said = f"The results of {run.name} are not shown beside those of {first.name}: {why}; evaluate both alike."
    return withhold(run, said, results=Results()) if why else run


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
    given = [one["config"] if isinstance(one.get("config"), Mapping) else {} for one in (ours, theirs)]
    options = [EvaluationSettings.deciding(one) for one in given]
    changed = [key for key in options[0] if options[0][key] != options[1][key]]
    return f"they were measured with other {listed(changed)}" if changed else None


def same_reference(ours: Any, theirs: Any) -> bool:
    """Whether two descriptions of a reference are of one: of the same pixels, or where unknown of the same name."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return bool(ours == theirs)
    hashes = {key for key in {*ours, *theirs} if key.endswith("_sha256")}
    hashed = hashes & ours.keys() and hashes & theirs.keys()
    return all(ours.get(key) == theirs.get(key) for key in (hashes if hashed else {*ours, *theirs} - hashes))
