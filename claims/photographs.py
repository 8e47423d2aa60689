# ruff: noqa: E501  (the sentences of the page)
"""What the articles' parts do on photographs, over seeds: python claims/photographs.py [--profile gpu] [--page].

A sweep (claims/photographs.yaml; docs/sweeps.md) whose results, a small file for every finished run, lie in claims/results
and are committed: it goes on where it was interrupted, and on another machine with the runs that it lacks. Then the
section of docs/results.md is written from those that are there; every number of it comes from these files.

The profile `cpu` trains on a part of CIFAR-10, drawn by seed, `gpu` (claims/photographs-gpu.yaml) on all of it.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

from consonar.components import load_tokenizer
from consonar.data.cifar10 import cifar10_place
from consonar.data.sources import open_source
from consonar.data.tokens import write_token_store
from consonar.files.writers import write_atomically
from consonar.json_types import Json
from consonar.metrics import metric_of
from consonar.seeding import generator, permutation
from consonar.sweeps.page import difference_rows, named, table
from consonar.sweeps.plan import Sweep
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.summary import BEST, Setting, Summary, summarise, value_cells
from consonar.sweeps.work import Place, read_result, run_sweep

HERE = Path(__file__).parent
NAMES = {"cpu": "photographs", "gpu": "photographs-gpu"}
PART = {"train": 5000, "test": 2500}
"""Pictures of each split of CIFAR-10 in the profile `cpu`."""
FD = "FD(efficientnet-lite0)"
COLUMNS = (f"{FD} validation", f"{FD} train", f"KID({FD[3:-1]}) validation", "precision", "recall", "copy rate (features)", "copy rate (tokens)")
GROUPS = {
    "Training": ("plain", "plain"),
    "Post-training of plain AR": ("plain+", "plain+ce"),
    "Post-training of reAR": ("rear+", "rear+ce"),
}
"""Heading: how the names of its rows begin that are no training, and what they are compared with."""
ARTICLES = (
    ("reAR beats plain AR", "3.02 → 1.86", "rear", "plain"),
    ("both parts beat the embedding alone", "2.12 → 2.00", "rear", "embedding"),
    ("both parts beat the noise alone", "2.18 → 2.00", "rear", "noise"),
    ("a truncated schedule beats a linear one", "2.02 → 2.00", "rear", "rear-linear"),
    ("an annealed rate beats rates from 0 to 0.5 throughout", "2.05 → 2.02", "rear-linear", "rear-uniform"),
    ("drawn rates beat a constant one", "2.08 → 2.05", "rear-uniform", "rear-constant"),
    ("the decode head at ¾ of the depth beats an early layer", "figures not in our copy", "rear", "rear-decode-2"),
    ("and the last layer", "figures not in our copy", "rear", "rear-decode-5"),
    ("tying the embedding to the codebook is worse", "figures not in our copy", "rear", "tied"),
    ("a larger reAR is better", "2.00 → 1.86", "rear-wide", "rear"),
    ("VA-pi beats its start", "15.55 → 9.23", "plain+vapi", "plain"),
    ("VA-pi beats as much cross-entropy", "not measured", "plain+vapi", "plain+ce"),
)
"""What the articles say, their FID, and which of our rows is to be below which. reAR (arXiv 2510.04450): ImageNet, with
guidance, 1.86 of L, else S; VA-pi (arXiv 2512.19680): LlamaGen-XL on ImageNet, no guidance."""


def prepare(profile: str) -> None:
    """The pictures and the tokens of a profile, where they are not there yet."""
    folder, data = Path("runs") / NAMES[profile], "cifar10"
    if profile == "cpu":
        data = f"cifar10:{folder / 'data'}"
        for split, count in PART.items():
            path = folder / "data" / f"{split}-00000-of-00001.parquet"
            if not path.exists():
                write_part(split, count, path)
    tokenizer = load_tokenizer("cifar10-32")
    for split, name, views in (("train", "tokens", "center_flip"), ("test", "tokens-validation", "center")):
        if not (folder / name).exists():
            source = open_source(data, split=split, image_size=tokenizer.image_size)
            write_token_store(folder / name, source, tokenizer, views=views)


def write_part(split: str, count: int, path: Path) -> None:
    """So many pictures of a split, the same ones wherever they are drawn from the same copy."""
    import datasets

    whole = datasets.load_dataset(cifar10_place(""), split=split)
    rows = sorted(permutation(generator(0, "claims", split), len(whole))[:count].tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: whole.select(rows).to_parquet(partial))


def results_of(sweep: Sweep, out: Path) -> dict[str, Json]:
    """Of the cells that have one."""
    place = Place(out, sweep, print)
    found = {name: read_result(place, cell) for name, cell in sweep.cells.items()}
    return {name: result for name, result in found.items() if result is not None}


def part_of(sweep: Sweep, results: dict[str, Json], rows: list[str], base: str) -> Summary:
    """What these rows say, compared with `base`."""
    cells = {name: cell for name, cell in sweep.cells.items() if cell.row in rows}
    chosen = replace(sweep, cells=cells, rows=tuple(rows), compare_with=base)
    return summarise(chosen, {name: result for name, result in results.items() if name in cells})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(NAMES), default="cpu", help="which machine it is sized for")
    parser.add_argument("--page", action="store_true", help="write the section from the results that are there, run nothing")
    options = parser.parse_args()
    name = NAMES[options.profile]
    file, out = HERE / f"{name}.yaml", HERE / "results" / name
    sweep = read_sweep(file, out)
    if not options.page:
        prepare(options.profile)
        run_sweep(sweep, out, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
