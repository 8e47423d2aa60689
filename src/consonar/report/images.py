"""Pictures of the page: read from a run folder, paired across runs by their seeds, and packed as base64 PNG.

PNG keeps every pixel, so that what is looked at is what was measured. Shapes: n images, H x W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from consonar.data.picture_files import read_image
from consonar.errors import UserError
from consonar.files.readers import read_npz
from consonar.report.records import Run

MAX_CLASSES, LEADING_CLASSES = 10, 6
MAX_RECONSTRUCTIONS = 16
MAX_NEAREST = 8
MAX_NEAREST_OF_MANY = 4
"""Samples beside their nearest training images, of each run, on a page of more than three."""
MAX_GRIDS = 3
PER_CLASS = {1: 8, 2: 4, 3: 2, 4: 2}
"""Samples of each class and run, by the number of runs; one on a page of more."""
SMALL = 96
"""Images up to this many pixels wide are shown at 2x with hard pixel edges."""
KINDS = {"integers": "iu", "texts": "US"}


class Picture(NamedTuple):
    """An image ready for the page: data URI, its text alternative, the width in CSS pixels that it wants."""

    uri: str
    alt: str
    width: int
    pixelated: bool


def picture(image: np.ndarray, alt: str) -> Picture:
    """Pack one image (H, W, 3) uint8."""
    buffer, width = io.BytesIO(), image.shape[1]
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(uri, alt, 2 * width if width <= SMALL else width, width <= SMALL)


def file_picture(path: Path, alt: str) -> Picture:
    """Pack an image file. Raises `UserError` if it does not decode."""
    return picture(np.asarray(read_image(path, str(path))), alt)


@dataclass(frozen=True)
class Sheet:
    """A `samples_*.npz`: images (n, H, W, 3) uint8, labels (n,), seeds (n,), and the nearest training image of each."""

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    nearest: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def rows_of(self, label: int) -> dict[int, int]:
        """{seed: row} of one class, by rising seed."""
        rows = np.flatnonzero(self.labels == label)
        return {int(self.seeds[row]): int(row) for row in rows[np.argsort(self.seeds[rows], kind="stable")]}

    def class_name(self, label: int) -> str:
        """The class's name where the file has names, otherwise "class 3"."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"

    def sample(self, row: int, run: Run) -> Picture:
        """One of its pictures."""
        name = self.class_name(int(self.labels[row]))
        return picture(self.images[row], f"{run.name}: sample of {name}, seed {int(self.seeds[row])}")


def load_sheet(path: Path) -> Sheet:
    """Read one `samples_*.npz`; raises as `load_arrays`."""
    arrays = load_arrays(path, pictures=("images",), columns={"labels": "integers", "seeds": "integers"})
    names = tuple(str(name) for name in np.atleast_1d(arrays.get("class_names", ())))
    return Sheet(arrays["images"], arrays["labels"], arrays["seeds"], arrays.get("nearest_train"), names)


def load_arrays(path: Path, pictures: Sequence[str], columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """An .npz of n `pictures` (n, H, W, 3) uint8, of `columns` (n,) of `KINDS`, and of what is optional.

    Raises `UserError` with the file and the array that is missing or is not as expected.
    """
    arrays = read_npz(path, remedy="write it again")
    if missing := [key for key in (*pictures, *columns) if key not in arrays]:
        raise UserError(f"{path}: holds no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    count = arrays[pictures[0]].shape[:1]
    for key in [key for key in (*pictures, "nearest_train", *columns) if key in arrays]:
        array, kind = arrays[key], columns.get(key)
        if kind is None:
            fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and 0 not in array.shape
        else:
            fits = array.dtype.kind in KINDS[kind] and array.ndim == 1
        if not fits or array.shape[:1] != count:
            expected = f"{kind} (n,)" if kind else "uint8 (n, H, W, 3)"
            raise UserError(
                f"{path}: {key} is {array.dtype} {array.shape}; expected {expected} with n as {pictures[0]}"
            )
    return arrays


ClassRow = tuple[str, list[list[int]]]
"""The name of a class, and for every run the row numbers in its sheet, in the same order of seeds."""


def pair_samples(sheets: Sequence[Sheet | None], per_class: int) -> tuple[list[ClassRow], bool]:
    """Choose up to `per_class` samples of each class, the same seeds for every run.

    Returns the rows and whether they are paired. Runs without a sheet (None) get an empty cell. If no (class, seed) is
    in all sheets the second value is False and each run shows its own first seeds, so the page can say so.
    """
    present = [sheet for sheet in sheets if sheet is not None]
    labels = sorted({int(label) for sheet in present for label in np.unique(sheet.labels)})
    common = {}
    for label in labels:
        first, *others = [sheet.rows_of(label) for sheet in present]
        common[label] = [seed for seed in first if all(seed in rows for rows in others)]
    paired = any(common.values()) or not labels
    chosen = []
    for label in [label for label in labels if common[label] or not paired]:
        cells = []
        for sheet in sheets:
            rows = sheet.rows_of(label) if sheet else {}
            cells.append([rows[seed] for seed in (common[label] if paired else [*rows])[:per_class] if rows])
        chosen.append((present[0].class_name(label), cells))
    return chosen, paired


def spread_evenly(count: int, limit: int) -> list[int]:
    """At most `limit` indices spread over range(count), first and last included."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def sample_blocks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Sample grids at temperature 1 and at each run's own best setting (once, where these are the same rows).

    [{"title", "settings": row or None per run, "paired", "classes": [{"name", "cells": [[Picture]] per run}]}].
    """
    at_one, best = [run.results.temperature_one for run in runs], [run.results.best_row for run in runs]
    blocks = {"At temperature 1": at_one, "Each at its own best temperature": best}
    if at_one == best:
        blocks = {"At temperature 1, which is also the best measured for each": at_one}
    made = []
    for title, settings in blocks.items():
        sheets = [load_sheet(row.samples) if row and row.samples else None for row in settings]
        rows, paired = pair_samples(sheets, PER_CLASS.get(len(runs), 1))
        classes = []
        for name, cells in [rows[i] for i in spread_evenly(len(rows), MAX_CLASSES)]:
            parts = zip(runs, sheets, cells, strict=True)
            pictures = [[sheet.sample(i, run) for i in cell] if sheet else [] for run, sheet, cell in parts]
            classes.append({"name": name, "cells": pictures})
        if classes:
            made.append({"title": title, "settings": settings, "paired": paired, "classes": classes})
    return made


def nearest_blocks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per run, samples beside their nearest training images: [{"run", "setting", "pairs": [(Picture, Picture)]}].

    Taken at the run's best setting, or at temperature 1 where none is called best; one sample per class.
    """
    blocks = []
    for run in runs:
        setting = run.results.best_row or run.results.temperature_one
        sheet = load_sheet(setting.samples) if setting and setting.samples else None
        if sheet is None or sheet.nearest is None:
            continue
        firsts = [row for _, ((row,),) in pair_samples([sheet], 1)[0]]
        limit = MAX_NEAREST_OF_MANY if len(runs) > 3 else MAX_NEAREST
        pairs = [
            (sheet.sample(i, run), picture(sheet.nearest[i], "the training image nearest to it"))
            for i in [firsts[i] for i in spread_evenly(len(firsts), limit)]
        ]
        blocks.append({"run": run, "setting": setting, "pairs": pairs})
    return blocks


def reconstruction_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How the tokenizer of each run writes and reads held-out pictures; runs that share one share a group.

    [{"runs": names, "pairs": [(original, reconstruction)], "metrics": {...}}]
    """
    groups: dict[Any, dict[str, Any]] = {}
    for run in [run for run in runs if run.reconstruction]:
        path, pairs = run.path / "reconstructions.npz", []
        if path.is_file():
            arrays = load_arrays(path, pictures=("originals", "reconstructions"), columns={"names": "texts"})
            originals, copies, names = arrays["originals"], arrays["reconstructions"], arrays["names"]
            pairs = [
                (picture(originals[i], f"original: {names[i]}"), picture(copies[i], f"reconstruction: {names[i]}"))
                for i in spread_evenly(len(originals), MAX_RECONSTRUCTIONS)
            ]
        key = (tuple(pairs), *sorted(run.reconstruction.items()))
        group = groups.setdefault(key, {"runs": [], "pairs": pairs, "metrics": run.reconstruction})
        group["runs"].append(run.name)
    return list(groups.values())


def training_grids(run: Run) -> list[tuple[str, Picture]]:
    """Up to three (step, sample grid) of a run's training, first and last too."""
    paths, found = sorted((run.path / "samples").glob("step_*.png")), []
    for path in [paths[i] for i in spread_evenly(len(paths), MAX_GRIDS)]:
        step = path.stem.removeprefix("step_").lstrip("0") or "0"
        found.append((step, file_picture(path, f"{run.name}: samples at step {step}")))
    return found
