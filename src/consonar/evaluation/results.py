"""What `evaluate` returns: metrics with everything that makes them a result, and the file that records it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from consonar import __version__
from consonar.cpu.timing import processor
from consonar.errors import UserError
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.metrics.copying import CopyRate


@dataclass(frozen=True)
class Measurement:
    """A value over all samples; `spread` is its standard deviation over `draws` disjoint parts (None for one draw)."""

    value: float
    spread: float | None = None


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    python, numpy = platform.python_version(), np.__version__
    return {"python": python, "torch": torch.__version__, "numpy": numpy, "consonar": __version__}


def machine_name(device: str) -> str:
    """The accelerator's name, or the processor's for `cpu`."""
    if torch.device(device).type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    return processor()


def check_place(path: Path, *, overwrite: bool, key: str) -> None:
    """Raises `UserError` where results could not be written, or would replace anything but results.

    Makes the folder that they belong into.
    """
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; name a file, such as {path / 'results.json'}")
    if path.exists() and not overwrite:
        raise UserError(f"{key}: {path} exists; choose another name, or add --overwrite")
    if path.exists() and not holds_results(path):
        raise UserError(f"{key}: {path} exists and holds no results, so it is not overwritten; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{key}: {path.parent} cannot be written; choose another folder")


def holds_results(path: Path) -> bool:
    """Whether a file is one that `Evaluation.to_json` wrote."""
    try:
        return {"schema", "metrics"} <= read_json(path).keys()
    except UserError:
        return False


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
    seed: int
    config: Json
    machine: str
    versions: dict[str, str]
    timestamp: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = 1

    def to_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the results. Raises UserError when the file exists (unless `overwrite`) or the disk is full."""
        path = Path(path)
        check_place(path, overwrite=overwrite, key="results")
        content = asdict(replace(self, copies={}))
        content["copies"] = {k: {"threshold": c.threshold, "quantile": c.quantile} for k, c in self.copies.items()}
        write_json(path, content, allow_nan=False)


def origin_of_numbers(results: Evaluation, reference: str) -> Json:
    """What all rows of results.json share: against what they were measured, with what, and what to know of it."""
    sizes = {f"num_{name}": count for name, count in results.num_reference.items()}
    hashes = {f"{name}_sha256": sha256 for name, sha256 in results.reference_sha256.items()}
    return {
        "feature_network": results.feature_network,
        "reference": {"name": reference, **sizes, **hashes},
        "noise_floor": {key: {"value": value} for key, value in results.noise_floor.items()},
        "remarks": results.remarks,
        "config": results.config,
        "versions": results.versions,
    }
