# ruff: noqa: E501  (the sentences of the page)
"""Writes docs/results.md and its pictures from a finished demo: python docs/make_results.py [runs/demo].

Every number comes from the demo's own result files; nothing is typed in by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consonar.data.picture_files import save_grid
from consonar.evaluation.results import read_results
from consonar.training.tracking import read_metrics

DOCS = Path(__file__).parent
NAMES = {
    "plain-ar": "plain AR",
    "plain-ar-ce": "plain AR, CE control",
    "plain-ar-vapi": "plain AR, VA-pi (spatial credit)",
    "rear": "reAR",
    "rear-ce": "reAR, CE control",
    "rear-vapi": "reAR, VA-pi (spatial credit)",
}
TRAINED = ("plain-ar", "rear")
SHOWN = ("plain-ar", "plain-ar-vapi", "rear", "rear-vapi")
COLUMNS = ("FD(efficientnet-lite0) validation", "FD(efficientnet-lite0) train", "precision", "recall",
           "copy rate (features)", "copy rate (tokens)", "entropy (teacher-forced)")  # fmt: skip
SECTIONS = ("claims-vapi", "reading", "diagnosis", "reading-diagnosis", "photographs", "reading-photographs",
            "photographs-gpu", "text", "reading-text", "text-gpu")  # fmt: skip
"""Between marks, written by the scripts in claims/; how to read them, by hand."""


def to_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def cell(entry: dict[str, float | None] | None) -> str:
    """Value and spread with digits that fit the spread."""
    if entry is None or entry["value"] is None:
        return "-"
    value, spread = entry["value"], entry["spread"]
    digits = 1 if value >= 10 else 3
    return f"{value:.{digits}f}" if spread is None else f"{value:.{digits}f} ± {spread:.{digits}f}"


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| model | temperature | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for run, content in results.items():
        for index, row in enumerate(content["rows"]):
            best = " (best)" if index == content["best"] else ""
            if row.get("matched_to"):
                best += f", entropy of {NAMES[row['matched_to']]}"
            cells = [cell(row["metrics"].get(column)) for column in COLUMNS]
            lines.append(f"| {NAMES[run]} | {row['temperature']:g}{best} | " + " | ".join(cells) + " |")
    return lines


def pictures(demo: Path, results: dict[str, dict[str, Any]]) -> None:
    """Samples at equal seeds and classes (rows of ten: one per class), and reconstructions."""
    images = DOCS / "images"
    for run, content in ((run, results[run]) for run in SHOWN):
        for label, index in (("t1", 0), ("best", content["best"])):
            with np.load(demo / run / content["rows"][index]["samples"]) as arrays:
                save_grid(to_images(arrays["images"][:40]), images / f"{run}-{label}.png", columns=10)
    with np.load(demo / "rear" / "reconstructions.npz") as arrays:
        rows = [
            part
            for i in (0, 10, 20)
            for part in (arrays["originals"][i : i + 10], arrays["reconstructions"][i : i + 10])
        ]
    save_grid(to_images(np.concatenate(rows)), images / "reconstructions.png", columns=10)


def overview(demo: Path, results: dict[str, dict[str, Any]]) -> None:
    """The README's picture, twenty images each: originals, reconstructions, plain AR, reAR, reAR after VA-pi (second temperature)."""
    with np.load(demo / "rear" / "reconstructions.npz") as arrays:
        parts = [arrays["originals"][:20], arrays["reconstructions"][:20]]
    for run, content in ((run, results[run]) for run in ("plain-ar", "rear", "rear-vapi")):
        with np.load(demo / run / content["rows"][1]["samples"]) as arrays:
            parts.append(arrays["images"][:20])
    save_grid(to_images(np.concatenate(parts)), DOCS / "images" / "overview.png", columns=10)


def lowest(lines: list[dict[str, float]]) -> str:
    """Where validation cross-entropy was lowest."""
    line = min(
        (line for line in lines if "validation/cross_entropy" in line), key=lambda e: e["validation/cross_entropy"]
    )
    return f"{line['validation/cross_entropy']:.3f} at step {line['step']}"


def kept(before: str) -> str:
    """The sections of other hands in a page, each once and in this order wherever it stood; an empty one for one that
    is not there yet."""
    found = {match[1]: match[0] for match in re.finditer(r"<!-- ([a-z-]+) -->.*?<!-- /\1 -->", before, re.DOTALL)}
    empty = {name: f"<!-- {name} --><!-- /{name} -->" for name in SECTIONS}
    return "\n\n".join((empty | found).values())


def main() -> None:
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    settings = json.loads((demo / "demo.json").read_text())
    results = {run: read_results(demo / run) for run in NAMES}
    last = {run: read_metrics(demo / run / "metrics.jsonl") for run in NAMES}
    final = {
        run: next(line for line in reversed(lines) if "validation/cross_entropy" in line) for run, lines in last.items()
    }
    reconstruction = json.loads((demo / "rear" / "reconstruction.json").read_text())
    first = results["rear"]
    row = first["rows"][0]
    floor = next((entry["value"] for entry in first["noise_floor"].values()), None)
    batch = {
        run: json.loads((demo / run / "config.json").read_text())["loop"]["batch_size"] for run in ("rear", "rear-vapi")
    }
    pictures(demo, results)
    overview(demo, results)
    lines = [
        "# Results", "",
        "Written by `python docs/make_results.py` from the files of `make demo`; every number is the demo's own. The section on VA-pi is "
        "written by `make claims-vapi`, that on diagnoses by `make claims-diagnosis`, those on photographs by `make claims`, on captions by "
        "`make claims-text`, and all of it by `make results-whole`; only the paragraphs on how to read them are by hand.", "",
        f"- Command: `make demo` (`consonar demo --minutes {settings['minutes']:g} --seed {settings['seed']:g}`), "
        f"{settings['steps']:g} steps of batch {batch['rear']} per training run, "
        f"{last['rear-vapi'][-1]['step']} updates of batch {batch['rear-vapi']} per post-training run (VA-pi with spatial credit).",
        f"- Machine: {first['machine']}; {', '.join(f'{k} {v}' for k, v in first['versions'].items())}.",
        f"- Data: OpenMoji, {first['reference']['num_train']} training and {first['reference']['num_validation']} validation images.",
        f"- Tokenizer: `{first['tokenizer']['name']}` (fingerprint {first['tokenizer']['fingerprint'][:12]}), of these validation images: PSNR "
        f"{reconstruction['psnr']:.2f} dB, SSIM {reconstruction['ssim']:.3f}, code usage {reconstruction['usage']:.1%}, "
        f"rFD(efficientnet-lite0) {reconstruction['rFD(efficientnet-lite0)']:.1f}.",
        f"- Feature network: {first['feature_network']['name']}, SHA-256 {first['feature_network']['sha256'][:12]}. "
        "`FD(efficientnet-lite0)` is not FID.",
        f"- {row['num_samples']} samples per row, the same classes and seeds for all rows; ± is the standard deviation over "
        f"{first['draws']} disjoint parts of them (parts are smaller than the whole, so it overstates the uncertainty of the value).",
        "", "## Plain AR, reAR, and both post-trained", "", *table(results), "", f"Protocol: {first['protocol']}.", "",
        "Checkpoints: " + ", ".join(f"{NAMES[run]} {content['checkpoint_sha256'][:12]}" for run, content in results.items()) + ".",
        "", "Teacher-forced on the validation images (clean context): "
        + "; ".join(
            f"{NAMES[run]} cross-entropy {line['validation/cross_entropy']:.3f} nats, accuracy {line['validation/accuracy']:.3f}"
            for run, line in final.items() if run in TRAINED
        ) + ". Lowest on the way: "
        + "; ".join(f"{NAMES[run]} {lowest(last[run])}" for run in TRAINED)
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
    before = (DOCS / "results.md").read_text() if (DOCS / "results.md").exists() else ""
    lines += [kept(before), ""]
    lines += ["### Tokenizer", "Validation images (odd rows) and what the tokenizer makes of them (even rows):", "",
              "![reconstructions](images/reconstructions.png)", "",
              "Emoji by [OpenMoji](https://openmoji.org), CC BY-SA 4.0."]  # fmt: skip
    (DOCS / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
