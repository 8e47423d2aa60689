"""The files that measuring a run leaves in its folder: of one measurement together, and of the model that is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from consonar.components import weights_sha256
from consonar.errors import UserError
from consonar.files.readers import plain_name, read_json
from consonar.files.writers import file_sha256
from consonar.json_types import Json, JsonMap

RESULTS, RECONSTRUCTION = "results.json", "reconstruction.json"
STAGED = ".evaluation.partial"


@contextmanager
def replacing(run: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well its files take the places of those of the same names in `run`.

    Until then all that was there stays, and so it does when the block fails. The .json files, which say what the others
    are, come last, and pictures that only the results before knew are removed.
    """
    staged, before = run / STAGED, sample_files(run)
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    staged.mkdir()
    try:
        yield staged
        for path in sorted(staged.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            path.replace(run / path.name)
        for name in before - sample_files(run):
            (run / name).unlink(missing_ok=True)
        for path in run.glob(".samples_t*"):  # drawn by a killed process, at temperatures that are not asked for now
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def samples_name(temperature: float) -> str:
    """The sample file of a temperature: in the digits that tell it from every other, 1 rather than 1.0."""
    return f"samples_t{repr(float(temperature)).removesuffix('.0')}.npz"


def sample_files(run: Path) -> set[str]:
    """The names of the sample files that the results of a run name, where these can be read."""
    try:
        return {row["samples"] for row in read_json(run / RESULTS)["rows"] if plain_name(row["samples"])}
    except (UserError, KeyError, TypeError):
        return set()


def exported_sha256(run: Path) -> str | None:
    """SHA-256 of the weights that a run has exported; None where there are none."""
    weights = run / "model" / "model.safetensors"
    return file_sha256(weights) if weights.is_file() else None


def of_match(other: Path) -> dict[str, str]:
    """What a row says of the run whose entropy its temperature was chosen to reach."""
    return {"matched_to": other.name, "matched_sha256": weights_sha256(other)}


def outdated(content: JsonMap, sha256: str | None) -> str | None:
    """Why results are not of the weights with this hash, in words that follow "the results"; else None.

    Where the weights were not kept with the results nothing can be compared.
    """
    measured = content.get("checkpoint_sha256")
    if sha256 is None or measured == sha256:
        return None
    if measured is None:
        return "do not say of which weights they are; evaluate again with --overwrite"
    return "are of weights that have changed since; evaluate again with --overwrite"


def is_measured(run: Path) -> bool:
    """Whether a run has results of the model that it has now."""
    return (run / RESULTS).is_file() and outdated(read_json(run / RESULTS), exported_sha256(run)) is None


def read_results(run: Path) -> Json:
    """results.json of a run. Raises `UserError` where it is missing, cannot be read, or is of another model."""
    content = read_json(run / RESULTS)
    if why := outdated(content, exported_sha256(run)):
        raise UserError(f"{run / RESULTS}: the results {why}")
    return content
