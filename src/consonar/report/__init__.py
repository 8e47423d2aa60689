"""The report: one self-contained HTML page about one to eight runs.

`folders` reads run folders into `records`; `tables`, `charts` and `images` lay out what is in them, `page` puts that
into the template, which holds the explanations and the design. What a number is called and means, and which way it is
better, stands in `consonar.metrics.METRICS`; what a method is called and does in `training.objectives.METHODS`.
No number comes from outside the run folders, so two calls give the same bytes.

A run folder holds `config.json`, and any of `metrics.jsonl`, `results.json` (schema 1) with its `samples_*.npz`,
`reconstructions.npz`, `reconstruction.json`, `samples/step_*.png`, and of post-training `stopped.json` and `best.json`.
What is missing is left out of the page; what is there and broken is a `UserError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consonar.errors import UserError
from consonar.files.writers import write_atomically
from consonar.report.folders import MAX_RUNS, load_runs

__all__ = ["MAX_RUNS", "load_runs", "write_report"]


def write_report(
    runs: Sequence[Path], out: Path, *, title: str | None = None, opening: Path | None = None, overwrite: bool = False
) -> Path:
    """Write one HTML page that compares 1 to 8 runs, and return its path. `opening`: a picture to show beside them.

    The page needs no network and no script. It is written under a temporary name and renamed, so that a failure leaves
    no half page. Raises `UserError` for a wrong number of runs, a missing or broken run folder, and an `out` that
    exists (unless `overwrite`).
    """
    from consonar.report.page import render

    out = Path(out)
    if out.is_dir():
        raise UserError(f"out {out}: is a folder; name a file, for example {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise UserError(f"out {out}: already exists; choose another name, or overwrite it (--overwrite)")
    if out.exists() and b"<!doctype html>" not in out.read_bytes()[:100]:
        raise UserError(f"out {out}: exists and is no page, so it is not overwritten; choose another name")
    html = render(load_runs(runs), title=title, opening=opening)
    write_atomically(out, lambda partial: partial.write_text(html, encoding="utf-8"))
    return out
