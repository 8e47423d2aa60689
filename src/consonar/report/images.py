"""Pictures of the page: read from a run folder, paired across runs by their seeds, and packed as base64 PNG.

PNG keeps every pixel, so that what is looked at is what was measured. Shapes: n images, H x W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from consonar.data.picture_files import read_image
from consonar.errors import UserError, reading
from consonar.files.readers import parse_json, read_npz
from consonar.report.records import Run

MAX_CLASSES, MAX_PROMPTS, LEADING_CLASSES = 10, 24, 6
LONGEST = 160
"""Letters of a prompt that are shown: of a longer one its beginning and its end."""
MAX_RECONSTRUCTIONS, MAX_GRIDS = 16, 3
MAX_NEAREST, MAX_NEAREST_OF_MANY = 8, 4
"""Samples beside their nearest training images, of each run; on a page of more than three runs."""
PER_CLASS = {1: 8, 2: 4, 3: 2, 4: 2}
"""Samples of each class and run, by the number of runs; one on a page of more."""
SMALL = 96
"""Images up to this many pixels wide are shown at 2x with hard pixel edges."""
COLUMNS = {"labels": ("iu", "integers"), "seeds": ("iu", "integers"), "names": ("US", "texts")}
"""Arrays (n,) of a file of pictures: kinds of dtype, and what these are called."""


def picture(image: np.ndarray | Path, alt: str) -> Markup:
    """An image (H, W, 3) uint8 as an `<img>` with its pixels inside. `UserError` for a file that does not decode."""
    pixels = image if isinstance(image, np.ndarray) else np.asarray(read_image(image, str(image)))
    buffer, width = io.BytesIO(), pixels.shape[1]
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data, small = base64.b64encode(buffer.getvalue()).decode("ascii"), width <= SMALL
    tag = Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" class="{}">')
    return tag.format(data, alt, 2 * width if small else width, "pixels" if small else "smooth")


@dataclass(frozen=True)
class Sheet:
    """A `samples_*.npz`: images (n, H, W, 3) uint8, labels (n,), seeds (n,), and the nearest training image of each.

    Where pictures were asked for in words (`of_prompts`) a class is a prompt.
    """

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    nearest: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    of_prompts: bool = False

    def rows_of(self, label: int) -> dict[int, int]:
        """{seed: row} of one class, by rising seed."""
        rows = np.flatnonzero(self.labels == label)
        return {int(self.seeds[row]): int(row) for row in rows[np.argsort(self.seeds[rows], kind="stable")]}

    def class_name(self, label: int) -> str:
        """The class's name where the file has names, otherwise "class 3"."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"

    def sample(self, row: int, run: Run) -> Markup:
        """One of its pictures."""
        name = as_shown(self.class_name(int(self.labels[row])))
        return picture(self.images[row], f"{run.name}: sample of {name}, seed {int(self.seeds[row])}")


def load_sheets(runs: Sequence[Run]) -> list[Sheet | None]:
    """What each run sampled for the row that it is shown by, where that was kept; raises as `load_arrays`."""
    sheets: list[Sheet | None] = []
    for path in [run.results.shown and run.results.shown.samples for run in runs]:
        if path:
            arrays = load_arrays(path, "images", "labels", "seeds")
            prompts = prompts_of(path, arrays)
            names = prompts or tuple(str(name) for name in np.atleast_1d(arrays.get("class_names", ())))
            found = Sheet(
                arrays["images"], arrays["labels"], arrays["seeds"], arrays.get("nearest_train"), names, bool(prompts)
            )
        sheets.append(found if path else None)
    return by_prompt(sheets) if any(sheet.of_prompts for sheet in sheets if sheet) else sheets


def prompts_of(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """What the samples of a file were asked for by, which its labels number; () for classes."""
    with reading(f"{path}: settings", "what samples were drawn with", "write it again"):
        told = parse_json(str(arrays["settings"])).get("prompts", []) if "settings" in arrays else []
        if told and not (isinstance(told, list) and 0 <= arrays["labels"].min() <= arrays["labels"].max() < len(told)):
            raise ValueError("labels that are no numbers of prompts")
        return tuple(" ".join(str(text).split()) for text in told)


def as_shown(name: str) -> str:
    """The name of a class, or a prompt, as long as the page has it."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 60]}…{name[-59:]}"


def by_prompt(sheets: Sequence[Sheet | None]) -> list[Sheet | None]:
    """The sheets with labels that mean the same in all of them, whatever each run was asked for."""
    names = [[sheet.class_name(label) for label in sheet.labels.tolist()] if sheet else [] for sheet in sheets]
    shared = {name: number for number, name in enumerate(dict.fromkeys(name for each in names for name in each))}
    return [
        sheet and replace(sheet, labels=np.array([shared[name] for name in each]), class_names=tuple(shared))
        for sheet, each in zip(sheets, names, strict=True)
    ]


def load_arrays(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """An .npz with these arrays, the first of n: `COLUMNS`, or pictures (n, H, W, 3) uint8.

    Raises `UserError` with the file and the array that is missing or is not as expected.
    """
    arrays = read_npz(path, remedy="write it again")
    if missing := [key for key in keys if key not in arrays]:
        raise UserError(f"{path}: holds no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    for key in [key for key in (*keys, "nearest_train") if key in arrays]:
        array = arrays[key]
        if key in COLUMNS:
            kinds, words = COLUMNS[key]
            fits, expected = array.dtype.kind in kinds and array.ndim == 1, f"{words} (n,)"
        else:
            fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and 0 not in array.shape
            expected = "uint8 (n, H, W, 3)"
        if not fits or len(array) != len(arrays[keys[0]]):
            raise UserError(f"{path}: {key} is {array.dtype} {array.shape}; expected {expected} with n as {keys[0]}")
    return arrays


ClassRow = tuple[str, list[list[int]]]
"""The name of a class, and for every run the row numbers in its sheet, in the same order of seeds."""
SampleLine = tuple[str, list[list[Markup]]]
"""The name of a class, and the pictures of every run."""
PicturePair = tuple[Markup, Markup]


def pair_samples(sheets: Sequence[Sheet | None], per_class: int) -> tuple[list[ClassRow], bool]:
    """Choose up to `per_class` samples of each class, the same seeds for every run.

    Returns the rows and whether they are paired. Runs without a sheet (None) get an empty cell. If no (class, seed) is
    in all sheets the second value is False and each run shows its own first seeds, so the page can say so.
    """
    present = [sheet for sheet in sheets if sheet is not None]
    labels = sorted({int(label) for sheet in present for label in np.unique(sheet.labels)})
    common = {label: set.intersection(*(set(sheet.rows_of(label)) for sheet in present)) for label in labels}
    paired = any(common.values()) or not labels
    chosen = []
    for label in [label for label in labels if common[label] or not paired]:
        rows = [sheet.rows_of(label) if sheet else {} for sheet in sheets]
        kept = [[row for seed, row in each.items() if seed in common[label] or not paired] for each in rows]
        chosen.append((present[0].class_name(label), [each[:per_class] for each in kept]))
    return chosen, paired


def spread_evenly(count: int, limit: int) -> list[int]:
    """At most `limit` indices spread over range(count), first and last included."""
    shown = min(count, limit)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def sample_lines(runs: Sequence[Run], sheets: Sequence[Sheet | None]) -> tuple[list[SampleLine], bool]:
    """Samples of each class side by side, and whether they are paired (`pair_samples`)."""
    chosen, paired = pair_samples(sheets, PER_CLASS.get(len(runs), 1))
    most = MAX_PROMPTS if any(sheet.of_prompts for sheet in sheets if sheet) else MAX_CLASSES
    lines = []
    for name, cells in [chosen[i] for i in spread_evenly(len(chosen), most)]:
        parts = zip(runs, sheets, cells, strict=True)
        pictures = [[sheet.sample(i, run) for i in cell] if sheet else [] for run, sheet, cell in parts]
        lines.append((as_shown(name), pictures))
    return lines, paired


def nearest_pairs(runs: Sequence[Run], sheets: Sequence[Sheet | None]) -> list[tuple[Run, list[PicturePair]]]:
    """Of each run that has them, samples beside their nearest training images; one sample per class."""
    limit, blocks = MAX_NEAREST_OF_MANY if len(runs) > 3 else MAX_NEAREST, []
    for run, sheet in zip(runs, sheets, strict=True):
        if sheet is not None and sheet.nearest is not None:
            firsts = [row for _, ((row,),) in pair_samples([sheet], 1)[0]]
            rows = [firsts[i] for i in spread_evenly(len(firsts), limit)]
            beside = "the training image nearest to it"
            blocks.append((run, [(sheet.sample(row, run), picture(sheet.nearest[row], beside)) for row in rows]))
    return blocks


def reconstruction_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How the tokenizer of each run writes and reads held-out pictures; runs that share one share a group.

    [{"runs": names, "pairs": [(original, reconstruction)], "metrics": {...}}]
    """
    groups: dict[str, dict[str, Any]] = {}
    for run in [run for run in runs if run.reconstruction]:
        path, pairs = run.path / "reconstructions.npz", []
        if path.is_file():
            arrays = load_arrays(path, "originals", "reconstructions", "names")
            originals, copies, names = arrays["originals"], arrays["reconstructions"], arrays["names"]
            pairs = [
                (picture(originals[i], f"original: {names[i]}"), picture(copies[i], f"reconstruction: {names[i]}"))
                for i in spread_evenly(len(originals), MAX_RECONSTRUCTIONS)
            ]
        shown = {"pairs": pairs, "metrics": run.reconstruction}
        groups.setdefault(str(shown), {**shown, "runs": []})["runs"].append(run.name)
    return list(groups.values())


def training_grids(run: Run) -> list[tuple[str, Markup]]:
    """Up to three (step, sample grid) of a run's training, first and last too."""
    paths = sorted((run.path / "samples").glob("step_*.png"))
    steps = [(path.stem.removeprefix("step_").lstrip("0") or "0", path) for path in paths]
    chosen = [steps[i] for i in spread_evenly(len(steps), MAX_GRIDS)]
    return [(step, picture(path, f"{run.name}: samples at step {step}")) for step, path in chosen]
