"""Pictures of the report: read from a run folder, paired across runs, and packed as base64 PNG.

PNG keeps every pixel, so that what is looked at is what was measured. Shapes: n images, H x W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from consonar.data.picture_files import read_image
from consonar.errors import UserError
from consonar.files.readers import read_npz
from consonar.report.records import Run

MAX_CLASSES = 10
MAX_RECONSTRUCTIONS = 16
MAX_NEAREST = 8
MAX_NEAREST_OF_MANY = 4
"""Samples beside their nearest training images, of each run, on a page of more than three."""
MAX_GRIDS = 3
LEADING_COLUMNS, LEADING_ROWS = 6, 6
"""Classes that lead the page, and rows of their pictures over all runs."""
SMALL = 96
"""Images up to this many pixels wide are shown at 2x with hard pixel edges."""


@dataclass(frozen=True)
class Picture:
    """An image ready for the page: data URI, the width in CSS pixels it wants, and its text alternative."""

    uri: str
    alt: str
    width: int
    pixelated: bool


@dataclass(frozen=True)
class Sheet:
    """A `samples_*.npz`: images (n, H, W, 3) uint8, labels (n,), seeds (n,), and the nearest training image of each."""

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    nearest: np.ndarray | None
    class_names: tuple[str, ...] | None

    def rows_of(self, label: int) -> dict[int, int]:
        """{seed: row} of one class, by rising seed."""
        rows = np.flatnonzero(self.labels == label)
        return {int(self.seeds[row]): int(row) for row in rows[np.argsort(self.seeds[rows], kind="stable")]}

    def class_name(self, label: int) -> str:
        """The class's name where the file has names, otherwise "class 3"."""
        if self.class_names is None or not 0 <= label < len(self.class_names):
            return f"class {label}"
        return self.class_names[label]


@dataclass(frozen=True)
class ClassRow:
    """One row of the sample grid: per run, the row numbers in its sheet, in the same order of seeds."""

    label: int
    name: str
    rows: tuple[tuple[int, ...], ...]


def picture(image: np.ndarray, alt: str) -> Picture:
    """Pack one image (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return _picture(buffer.getvalue(), alt, width=image.shape[1])


def file_picture(path: Path, alt: str) -> Picture:
    """Pack an image file. Raises `UserError` if it does not decode."""
    return picture(np.asarray(read_image(path, str(path))), alt)


def _picture(data: bytes, alt: str, *, width: int) -> Picture:
    uri = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    small = width <= SMALL
    return Picture(uri=uri, alt=alt, width=2 * width if small else width, pixelated=small)


def load_sheet(path: Path) -> Sheet:
    """Read one `samples_*.npz`. Raises `UserError` with the file and the array that is missing or has a wrong shape."""
    arrays = _load_arrays(path, required=("images", "labels", "seeds"))
    images = arrays["images"]
    _check_images(path, "images", images)
    for key in ("labels", "seeds"):
        if arrays[key].shape != (len(images),) or arrays[key].dtype.kind not in "iu":
            found = f"{arrays[key].dtype} of shape {arrays[key].shape}"
            raise UserError(f"{path}: {key} is {found}, expected integers of shape ({len(images)},) like images")
    nearest = arrays.get("nearest_train")
    if nearest is not None:
        _check_images(path, "nearest_train", nearest, count=len(images))
    names = arrays.get("class_names")
    class_names = None if names is None else tuple(str(name) for name in names)
    return Sheet(images, arrays["labels"], arrays["seeds"], nearest, class_names)


def load_reconstructions(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read `reconstructions.npz`: originals and reconstructions (n, H, W, 3) uint8, and n names.

    Raises `UserError` naming the file and the array that is missing or has a wrong shape.
    """
    arrays = _load_arrays(path, required=("originals", "reconstructions", "names"))
    originals, reconstructions = arrays["originals"], arrays["reconstructions"]
    _check_images(path, "originals", originals)
    _check_images(path, "reconstructions", reconstructions, count=len(originals))
    if arrays["names"].shape != (len(originals),):
        raise UserError(f"{path}: names has shape {arrays['names'].shape}, expected ({len(originals)},) like originals")
    return originals, reconstructions, [str(name) for name in arrays["names"]]


def _load_arrays(path: Path, required: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_npz(path, remedy="write it again")
    missing = [key for key in required if key not in arrays]
    if missing:
        raise UserError(f"{path}: holds no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    return arrays


def _check_images(path: Path, key: str, images: np.ndarray, count: int | None = None) -> None:
    wrong_count = count is not None and len(images) != count
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or wrong_count:
        expected = f"({'n' if count is None else count}, H, W, 3) uint8"
        raise UserError(f"{path}: {key} is {images.shape} {images.dtype}, expected {expected}")


def pair_samples(sheets: Sequence[Sheet | None], per_class: int) -> tuple[list[ClassRow], bool]:
    """Choose up to `per_class` samples of each class, the same seeds for every run.

    Returns the rows and whether they are paired. Runs without a sheet (None) get an empty cell. If no (class, seed) is
    in all sheets the second value is False and each run shows its own first seeds, so the page can say so.
    """
    present = [sheet for sheet in sheets if sheet is not None]
    if not present:
        return [], True
    labels = sorted({int(label) for sheet in present for label in np.unique(sheet.labels)})
    common: dict[int, list[int]] = {}
    for label in labels:
        per_sheet = [sheet.rows_of(label) for sheet in present]
        common[label] = [seed for seed in per_sheet[0] if all(seed in rows for rows in per_sheet)]
    paired = any(common.values())
    chosen: list[ClassRow] = []
    for label in labels:
        if paired and not common[label]:
            continue
        cells = []
        for sheet in sheets:
            rows = {} if sheet is None else sheet.rows_of(label)
            seeds = common[label] if paired else list(rows)
            cells.append(tuple(rows[seed] for seed in seeds[:per_class]) if rows else ())
        chosen.append(ClassRow(label, present[0].class_name(label), tuple(cells)))
    return chosen, paired


def spread_evenly(count: int, limit: int) -> list[int]:
    """At most `limit` indices spread over range(count), first and last included."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def reconstruction_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Pairs of original and reconstruction; runs that share a tokenizer share one group.

    [{"runs": names, "pairs": [(Picture, Picture)], "metrics": {...}}], [] where no run has `reconstructions.npz`.
    """
    groups: dict[bytes, dict[str, Any]] = {}
    for run in runs:
        path = run.path / "reconstructions.npz"
        if not (path.is_file() and run.reconstructs):
            continue
        originals, reconstructions, names = load_reconstructions(path)
        group = groups.setdefault(originals.tobytes() + reconstructions.tobytes(), {"runs": [], "metrics": {}})
        group["runs"].append(run.name)
        group["metrics"] |= run.reconstruction
        group["pairs"] = [
            (picture(originals[i], f"original: {names[i]}"), picture(reconstructions[i], f"reconstruction: {names[i]}"))
            for i in spread_evenly(len(originals), MAX_RECONSTRUCTIONS)
        ]
    return list(groups.values())


def sample_blocks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Sample grids at temperature 1 and at each run's own best setting (once, where these are the same rows).

    [{"title", "settings": row or None per run, "paired", "classes": [{"name", "cells": [[Picture]] per run}]}].
    """
    at_one = [run.results.temperature_one if run.results else None for run in runs]
    best = [run.results.best_row if run.results else None for run in runs]
    blocks = [("At temperature 1", at_one), ("Each at its own best temperature", best)]
    if at_one == best:
        blocks = [("At temperature 1, which is also the best measured for each", at_one)]
    per_class = {1: 8, 2: 4, 3: 2, 4: 2}.get(len(runs), 1)
    made = []
    for title, settings in blocks:
        sheets = [load_sheet(row.samples) if row and row.samples else None for row in settings]
        rows, paired = pair_samples(sheets, per_class)
        if not rows:
            continue
        classes = []
        for row in [rows[i] for i in spread_evenly(len(rows), MAX_CLASSES)]:
            cells = [
                [_sample(sheet, i, run) for i in cell] if sheet else []
                for run, sheet, cell in zip(runs, sheets, row.rows, strict=True)
            ]
            classes.append({"name": row.name, "cells": cells})
        made.append({"title": title, "settings": settings, "paired": paired, "classes": classes})
    return made


def leading_pictures(blocks: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the page begins with, of the last of `sample_blocks`: a strip of pictures for every run, a class a column.

    {"names" of the classes, "paired", "strips": [{"index", "setting", "pictures": [Picture or None]}]}
    """
    if not blocks:
        return None
    block = blocks[-1]
    classes = [block["classes"][i] for i in spread_evenly(len(block["classes"]), LEADING_COLUMNS)]
    strips = []
    for index, setting in enumerate(block["settings"]):
        cells = [row["cells"][index] for row in classes]
        num_rows = min(max(1, LEADING_ROWS // len(runs)), max(map(len, cells)))
        pictures = [cell[i] if i < len(cell) else None for i in range(num_rows) for cell in cells]
        strips.append({"index": index, "setting": setting, "pictures": pictures})
    return {"names": [row["name"] for row in classes], "paired": block["paired"], "strips": strips}


def _sample(sheet: Sheet, row: int, run: Run) -> Picture:
    seed, name = int(sheet.seeds[row]), sheet.class_name(int(sheet.labels[row]))
    return picture(sheet.images[row], f"{run.name}: sample of {name}, seed {seed}")


def nearest_blocks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per run, samples beside their nearest training images: [{"index", "setting", "pairs": [(Picture, Picture)]}].

    Taken at the run's best setting, or at temperature 1 where that one has no nearest images; one sample per class.
    """
    blocks = []
    for index, run in enumerate(runs):
        settings = (run.results.best_row, run.results.temperature_one) if run.results else ()
        for setting in settings:
            sheet = load_sheet(setting.samples) if setting and setting.samples else None
            if sheet is None or sheet.nearest is None:
                continue
            firsts = [cell for row in pair_samples([sheet], 1)[0] for cell in row.rows[0]]
            limit = MAX_NEAREST_OF_MANY if len(runs) > 3 else MAX_NEAREST
            chosen = [firsts[i] for i in spread_evenly(len(firsts), limit)]
            pairs = [
                (_sample(sheet, i, run), picture(sheet.nearest[i], "the training image nearest to it")) for i in chosen
            ]
            blocks.append({"index": index, "setting": setting, "pairs": pairs})
            break
    return blocks


def training_grids(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Up to three sample grids of each run's training, first and last too: [{"index", "grids": [(step, Picture)]}]."""
    found = []
    for index, run in enumerate(runs):
        paths = sorted((run.path / "samples").glob("step_*.png"))
        chosen = [paths[i] for i in spread_evenly(len(paths), MAX_GRIDS)]
        grids = [(path.stem.removeprefix("step_").lstrip("0") or "0", path) for path in chosen]
        if grids:
            pictures = [(step, file_picture(path, f"{run.name}: samples at step {step}")) for step, path in grids]
            found.append({"index": index, "grids": pictures})
    return found
