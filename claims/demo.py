# ruff: noqa: E501  (the sentences of the page)
"""The main job on emoji, of a finished demo: python claims/demo.py [runs/demo] [--page].

The numbers of `make demo`, and what they are of, are kept in claims/results/demo, a file a run, and its pictures in
docs/images, and committed. Then the section of docs/results.md is written from these files.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from photographs import one_line, write_section

from consonar.data.picture_files import save_grid
from consonar.evaluation.results import RECONSTRUCTION, RESULTS
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
KEPT, IMAGES = ROOT / "claims" / "results" / "demo", ROOT / "docs" / "images"
NAMES = {
    "plain-ar": "plain AR",
    "plain-ar-ce": "plain AR, CE control",
    "plain-ar-vapi": "plain AR, VA-pi (spatial credit)",
    "plain-ar-isentropic": "plain AR, VA-pi with the entropy held",
    "rear": "reAR",
    "rear-ce": "reAR, CE control",
    "rear-vapi": "reAR, VA-pi (spatial credit)",
    "rear-isentropic": "reAR, VA-pi with the entropy held",
}
TRAINED = ("plain-ar", "rear")
SHOWN = ("plain-ar", "plain-ar-vapi", "plain-ar-isentropic", "rear", "rear-vapi", "rear-isentropic")
PICTURED = ("plain-ar", "rear", "rear-vapi", "rear-isentropic")
COLUMNS = ("FD(efficientnet-lite0) validation", "FD(efficientnet-lite0) train", "precision", "recall",
           "copy rate (features)", "copy rate (tokens)", "entropy (teacher-forced)")  # fmt: skip


def to_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def cell(entry: dict[str, float | None] | None) -> str:
    """Value and spread with digits that fit the spread."""
    if entry is None or entry["value"] is None:
        return "-"
    value, spread = entry["value"], entry["spread"]
    digits = 1 if value >= 10 else 3
    return f"{value:.{digits}f}" if spread is None else f"{value:.{digits}f} ± {spread:.{digits}f}"


def table(results: dict[str, Json]) -> list[str]:
    lines = ["| model | temperature | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for run, content in results.items():
        for index, row in enumerate(content["rows"]):
            best = " (best)" if index == content["best"] else ""
            if row.get("matched_to"):
                best += f", entropy of {NAMES[row['matched_to']]}"
            cells = [cell(row["metrics"].get(column)) for column in COLUMNS]
            lines.append(f"| {NAMES[run]} | {row['temperature']:g}{best} | " + " | ".join(cells) + " |")
    return lines


def read(path: Path) -> Json:
    """A file of a run, which says where it lies by paths from here."""
    return json.loads(json.dumps(read_json(path, "it is of no finished demo")).replace(f"{ROOT}/", ""))


def keep(demo: Path) -> None:
    """The files of a finished demo that the page is of: of every run what a study keeps of a cell, configuration,
    validations and results; and, last, how the work was planned."""
    plan, kept = read(demo / "demo.json"), {}
    for run in NAMES:
        results, lines = read(demo / run / RESULTS), read_metrics(demo / run / "metrics.jsonl")
        kept[run] = {
            "schema": 1,
            "asked": {"config": read(demo / run / "config.json")},
            "run": Path(os.path.relpath(demo / run, KEPT)).as_posix(),
            "start_weights": results["origin"].get("init_sha256"),
            "validations": [line for line in lines if "validation/cross_entropy" in line],
            "results": results,
        }
    kept["demo"] = plan | {"reconstruction": read(demo / "rear" / RECONSTRUCTION)}
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, content in kept.items():
        write_json(KEPT / f"{name}.json", content)


def pictures(demo: Path, results: dict[str, Json]) -> None:
    """Samples at equal seeds and classes (rows of ten: one per class), and reconstructions."""
    for run, content in ((run, results[run]) for run in SHOWN):
        for label, index in (("t1", 0), ("best", content["best"])):
            with np.load(demo / run / content["rows"][index]["samples"]) as arrays:
                save_grid(to_images(arrays["images"][:40]), IMAGES / f"{run}-{label}.png", columns=10)
    with np.load(demo / "rear" / "reconstructions.npz") as arrays:
        rows = [
            part
            for i in (0, 10, 20)
            for part in (arrays["originals"][i : i + 10], arrays["reconstructions"][i : i + 10])
        ]
    save_grid(to_images(np.concatenate(rows)), IMAGES / "reconstructions.png", columns=10)


def overview(demo: Path, results: dict[str, Json]) -> None:
    """The README's picture, twenty images each: originals, reconstructions, `PICTURED` (second temperature)."""
    with np.load(demo / "rear" / "reconstructions.npz") as arrays:
        parts = [arrays["originals"][:20], arrays["reconstructions"][:20]]
    for run, content in ((run, results[run]) for run in PICTURED):
        with np.load(demo / run / content["rows"][1]["samples"]) as arrays:
            parts.append(arrays["images"][:20])
    save_grid(to_images(np.concatenate(parts)), IMAGES / "overview.png", columns=10)


def lowest(lines: list[dict[str, float]]) -> str:
    """Where validation cross-entropy was lowest."""
    line = min(lines, key=lambda line: line["validation/cross_entropy"])
    return f"{line['validation/cross_entropy']:.3f} at step {line['step']}"


def page(demo: Json, known: dict[str, Json]) -> str:
    """The section, of the files by name."""
    results = {run: one["results"] for run, one in known.items()}
    validations = {run: one["validations"] for run, one in known.items()}
    batch = {run: one["asked"]["config"]["loop"]["batch_size"] for run, one in known.items()}
    reconstruction, first = demo["reconstruction"], results["rear"]
    row = first["rows"][0]
    floor = next((entry["value"] for entry in first["noise_floor"].values()), None)
    lines = [
        "## Plain AR, reAR, and both post-trained: the demo", "",
        f"- Command: `make demo MINUTES={demo['minutes']:g}` (`consonar demo --minutes {demo['minutes']:g} --seed {demo['seed']:g}`), "
        f"{demo['steps']:g} steps of batch {batch['rear']} per training run, "
        f"{demo['updates']:g} updates of batch {batch['rear-vapi']} per post-training run (VA-pi with spatial credit; the same with the entropy of every "
        "position held at that of the model it starts from).",
        f"- Machine: {first['machine']}; {', '.join(f'{k} {v}' for k, v in first['versions'].items())}.",
        f"- Data: OpenMoji, {first['reference']['num_train']} training and {first['reference']['num_validation']} validation images.",
        f"- Tokenizer: `{first['tokenizer']['name']}` (fingerprint {first['tokenizer']['fingerprint'][:12]}), of these validation images: PSNR "
        f"{reconstruction['psnr']:.2f} dB, SSIM {reconstruction['ssim']:.3f}, code usage {reconstruction['usage']:.1%}, "
        f"rFD(efficientnet-lite0) {reconstruction['rFD(efficientnet-lite0)']:.1f}.",
        f"- Feature network: {first['feature_network']['name']}, SHA-256 {first['feature_network']['sha256'][:12]}. "
        "`FD(efficientnet-lite0)` is not FID.",
        f"- {row['num_samples']} samples per row, the same classes and seeds for all rows; ± is the standard deviation over "
        f"{first['draws']} disjoint parts of them (parts are smaller than the whole, so it overstates the uncertainty of the value).",
        "", *table(results), "", f"Protocol: {first['protocol']}.", "",
        "Checkpoints: " + ", ".join(f"{NAMES[run]} {content['checkpoint_sha256'][:12]}" for run, content in results.items()) + ".",
        "", "Teacher-forced on the validation images (clean context): "
        + "; ".join(
            f"{NAMES[run]} cross-entropy {lines[-1]['validation/cross_entropy']:.3f} nats, accuracy {lines[-1]['validation/accuracy']:.3f}"
            for run, lines in validations.items() if run in TRAINED
        ) + ". Lowest on the way: "
        + "; ".join(f"{NAMES[run]} {lowest(validations[run])}" for run in TRAINED)
        + ".",
        "" if floor is None else f"\nReal validation images against the training images: FD {floor:.1f}.", "",
        "One seed and one budget: a difference smaller than the spread is no difference, and the spread does not cover "
        "training again with another seed.", "",
    ]  # fmt: skip
    for label, title in (("t1", "Temperature 1"), ("best", "Each model's best temperature (by validation FD)")):
        lines += [f"### {title}", "Columns are the ten classes; equal places have equal seeds.", ""]
        for run, content in ((run, results[run]) for run in SHOWN):
            temperature = content["rows"][0 if label == "t1" else content["best"]]["temperature"]
            lines += [
                f"{NAMES[run]}, temperature {temperature:g}:",
                "",
                f"![{NAMES[run]} samples](images/{run}-{label}.png)",
                "",
            ]
    lines += [
        "### Tokenizer", "Validation images (odd rows) and what the tokenizer makes of them (even rows):", "",
        "![reconstructions](images/reconstructions.png)", "", "Emoji by [OpenMoji](https://openmoji.org), CC BY-SA 4.0.",
    ]  # fmt: skip
    return "\n".join(lines)


@one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--page", action="store_true", help="write the page from the files that are kept alone")
    given = parser.parse_args()
    if not given.page:
        keep(given.demo)
    known = {run: read_json(KEPT / f"{run}.json") for run in NAMES}
    if not given.page:
        results = {run: one["results"] for run, one in known.items()}
        pictures(given.demo, results)
        overview(given.demo, results)
    write_section("demo", page(read_json(KEPT / "demo.json"), known))


if __name__ == "__main__":
    main()
