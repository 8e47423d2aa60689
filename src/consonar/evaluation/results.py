"""What `evaluate` returns, metrics with everything that makes them a result, and the files that record it."""

import hashlib
import platform
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from consonar import __version__
from consonar.distributed import ALONE, World, of_every
from consonar.errors import UserError
from consonar.files.lock import hold, remove_partials
from consonar.files.readers import has_keys, plain_name, read_json
from consonar.files.writers import check_replaced, check_writable, file_sha256, write_json
from consonar.json_types import Json, JsonMap
from consonar.metrics.copying import CopyRate

RESULTS, RECONSTRUCTION = "results.json", "reconstruction.json"
STAGED = ".evaluation.partial"
AGAIN = "evaluate again with --overwrite"
RESULT_KEYS = frozenset(("schema", "metrics"))


@dataclass(frozen=True)
class Measurement:
    """A value over all samples."""

    value: float
    spread: float | None = None
    """Its standard deviation over `draws` disjoint parts; None for one draw."""
    error: float | None = None
    """Standard error of the value, of metrics that know one."""
    classes: dict[str, float] | None = None
    """By label, of a metric that is a mean over classes."""
    interval: tuple[float, float] | None = None
    """Of 95 %, of metrics that know one."""

    def record(self) -> Json:
        """For a file: without what there is not, but the spread."""
        return {name: found for name, found in asdict(self).items() if name in ("value", "spread") or found is not None}


@dataclass(frozen=True)
class Row:
    """What is read of a row of a run's results, beside its sampler."""

    temperature: float
    num_samples: int
    seed: int
    metrics: dict[str, Measurement]
    matched_to: str | None = None
    guidance_scale: float = 1.0


def setting_text(temperature: float, guidance: float) -> str:
    """What tells a row from the others, in words."""
    return f"temperature {temperature:g}" + ("" if guidance == 1 else f", guidance {guidance:g}")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on, of those that are installed, of our own code,
    and how many threads add them up."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("pillow", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    ours = {"consonar": __version__, "consonar source": source_hash()}
    return {**found, **ours, "threads": str(torch.get_num_threads())}


@cache
def source_hash(package: Path = Path(__file__).parents[1]) -> str:
    """Twelve digits of a SHA-256 of all Python files of a package, ours: tells two states of one version apart, and is
    the same wherever and on whatever system it lies."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in package.rglob("*.py")):
        digest.update(f"{name}\0".encode() + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12]


source_hash()  # that of what was imported: files may change under a job of hours


def check_place(path: Path, *, overwrite: bool, key: str, keys: Set[str] = RESULT_KEYS) -> None:
    """Makes the folder of results; `UserError` where they cannot be written, or would replace anything but results,
    which have these `keys`."""
    is_ours = partial(has_keys, keys=keys)
    check_replaced(path, key, "results.json", "holds no results", is_ours, overwrite=overwrite)
    check_writable(path, key)
    path.parent.mkdir(parents=True, exist_ok=True)


def write_results(path: Path, content: Json, *, overwrite: bool, key: str, keys: Set[str] = RESULT_KEYS) -> None:
    """Raises as `check_place`: other results may have come since that was asked, before they were measured."""
    check_place(path, overwrite=overwrite, key=key, keys=keys)
    write_json(path, content)


@dataclass(frozen=True)
class Evaluation:
    """Everything that makes a metric a result. `to_json` writes all of it but the per-sample part of `copies`."""

    metrics: dict[str, Measurement]
    unavailable: dict[str, str]
    """Metrics that this reference or these samples do not allow, and why."""
    remarks: tuple[str, ...]
    """What must be known to read the numbers, one line each."""
    noise_floor: dict[str, float]
    """Fréchet distances of validation to training images: what real images reach."""
    copies: dict[str, CopyRate]
    """`tokens` and `features`: threshold, and nearest training image of every sample."""
    num_samples: int
    num_reference: dict[str, int]
    """Images per set of the reference; none for statistics."""
    reference_sha256: dict[str, str]
    """Of the pixels of each set of the reference, and of its file of statistics."""
    samples: Json
    """Name and SHA-256 of the file, and the sampler's settings when it holds them."""
    reference: str
    feature_network: dict[str, str]
    protocol: str
    """What the numbers are of, in one line: how many samples, whose features, against what of the reference."""
    seed: int
    config: Json
    machine: str
    versions: dict[str, str]
    tokenizer: Json = field(default_factory=dict)
    """Name and fingerprint of the one in whose tokens copies were counted; empty: they were not."""
    bad_images: Json = field(default_factory=dict)
    """How many pictures that cannot be read were left out, and up to which share; empty: none would have been."""
    timestamp: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = 1

    def to_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the results. Raises UserError when the file exists (unless `overwrite`) or the disk is full."""
        path = Path(path)
        content = asdict(replace(self, copies={}))
        content["metrics"] = {name: found.record() for name, found in self.metrics.items()}
        content["copies"] = {k: {"threshold": c.threshold, "quantile": c.quantile} for k, c in self.copies.items()}
        write_results(path, content, overwrite=overwrite, key="results")


def origin_of_numbers(results: Evaluation) -> Json:
    """What all rows of results.json share: against what they were measured, with what, and what to know of it."""
    sizes = {f"num_{name}": count for name, count in results.num_reference.items()}
    hashes = {f"{name}_sha256": sha256 for name, sha256 in results.reference_sha256.items()}
    return {
        "feature_network": results.feature_network,
        "reference": {"name": results.reference, **sizes, **hashes},
        "noise_floor": {key: {"value": value} for key, value in results.noise_floor.items()},
        "protocol": results.protocol,
        "remarks": results.remarks,
        "bad_images": results.bad_images,
        "config": results.config,
        "versions": results.versions,
    }


@contextmanager
def replacing(run: Path, record: str, *, overwrite: bool, world: World = ALONE) -> Iterator[Path]:
    """A folder to fill; when the block ends well its files take the places of those of the same names in `run`.

    Until then all that was there stays, and so it does when the block fails. The .json files, which say what the others
    are, come last, and pictures that only the results before knew are removed. Other processes are kept out of the run,
    but those of `world`: the first of them holds, makes and ends it for all. Raises `UserError` where one is at it, and
    where the file `record` is there, unless `overwrite`.
    """
    if not world.is_main:
        of_every(None, world)  # until the folder is there
        yield run / STAGED
        return
    with hold(run):
        check_unmeasured(run, record, overwrite=overwrite)
        staged, before = run / STAGED, sample_files(run)
        remove_partials(run)  # of a process that was killed, at what it staged and at its samples
        staged.mkdir()
        try:
            of_every(None, world)
            yield staged
            for path in sorted(staged.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
                path.replace(run / path.name)
            for name in before - sample_files(run):
                (run / name).unlink(missing_ok=True)
            for path in run.glob(".samples_t*"):  # drawn by a killed process, at temperatures not asked for now
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            shutil.rmtree(staged, ignore_errors=True)


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


def outdated(content: JsonMap, sha256: str | None) -> str | None:
    """Why results are not of the weights with this hash (None: not known), in words after "the results"; else None."""
    measured = content.get("checkpoint_sha256")
    if sha256 is None or measured == sha256:
        return None
    what = "do not say of which weights they are" if measured is None else "are of weights that have changed since"
    return f"{what}; {AGAIN}"


def check_unmeasured(run: Path, record: str, *, overwrite: bool) -> None:
    """Raises `UserError` where the file `record` is in a run, unless `overwrite`."""
    if (run / record).exists() and not overwrite:
        of = " of weights that have changed since" if record == RESULTS and not is_measured(run) else ""
        raise UserError(f"{run / record} exists{of}; add --overwrite to measure again")


def is_measured(run: Path) -> bool:
    """Whether a run has results of the model that it has now."""
    return (run / RESULTS).is_file() and outdated(read_json(run / RESULTS), exported_sha256(run)) is None


def read_results(run: Path) -> Json:
    """results.json of a run. Raises `UserError` where it is missing, cannot be read, or is of another model."""
    content = read_json(run / RESULTS)
    if why := outdated(content, exported_sha256(run)):
        raise UserError(f"{run / RESULTS}: the results {why}")
    return content
