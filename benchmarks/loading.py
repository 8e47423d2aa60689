"""Memory and time of loading and converting a large generator, against the plain way.

A synthetic file with the shapes of LlamaGen-XL (float32, 3.1 GB) is made in a temporary folder. Each alternative runs
in a process of its own, which reports its largest resident memory above what it had after its imports:
`load_generator`; `convert` from a .pt file; and the plain way, a module with random weights, `torch.load`,
`load_state_dict`. Every weight is read once (summed), so that nothing is saved by not reading the file. Linux.
Run: python benchmarks/loading.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_result

from consonar.components import load_generator
from consonar.config_io import to_dict
from consonar.convert import convert
from consonar.files.weights import save_component
from consonar.generators import build_generator
from consonar.generators.llamagen import LLAMAGEN_PRESETS
from consonar.origin import Origin
from consonar.types import Grid

TARGET = 1.2


def memory(field: str) -> int:
    """Bytes of this process: VmRSS resident now, VmHWM at most so far."""
    # Not getrusage: its peak survives exec, so that a child would report what its parent once had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def config_of(preset: str) -> Any:
    return LLAMAGEN_PRESETS[preset].sized(16384, 256, 1000, Grid(16, 16))


def make_files(preset: str, folder: Path) -> None:
    """A released-style .pt file and a component folder with the same drawn weights."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_generator(config_of(preset)).state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    state = {key: torch.rand(shape, generator=rng) for key, shape in shapes.items()}
    torch.save({"model": state}, folder / "released.pt")
    head = {"component": "generator", **to_dict(Origin()), **to_dict(config_of(preset))}
    save_component(folder / "model", head, state)


def load(preset: str, folder: Path) -> float:
    return total(load_generator(folder / "model"))


def convert_file(preset: str, folder: Path) -> float:
    convert(folder / "released.pt", folder / "converted")
    return 0.0


def load_plainly(preset: str, folder: Path) -> float:
    generator = build_generator(config_of(preset))
    generator.load_state_dict(torch.load(folder / "released.pt", weights_only=True)["model"])
    return total(generator)


def total(generator: torch.nn.Module) -> float:
    return float(sum(parameter.sum() for parameter in generator.parameters()))


TASKS: dict[str, Callable[[str, Path], Any]] = {
    "make": make_files, "load": load, "convert": convert_file, "plain": load_plainly
}  # fmt: skip


def run_task(task: str, preset: str, folder: Path) -> None:
    """In the child: prints the memory above the baseline, the seconds, and the sum of the weights."""
    torch.set_num_threads(1)
    before, start = memory("VmRSS"), time.perf_counter()
    value = TASKS[task](preset, folder)
    figures = {"bytes": memory("VmHWM") - before, "seconds": time.perf_counter() - start, "sum": value}
    print(json.dumps(figures))


def in_a_process(task: str, preset: str, folder: Path) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--preset", preset, "--task", task, "--folder", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=LLAMAGEN_PRESETS, default="XL")
    parser.add_argument("--temporary", type=Path, help="where to make the folder; needs three times the file's size")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print the figures and write no result file")
    args = parser.parse_args()
    if args.task:
        run_task(args.task, args.preset, args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.temporary) as name:
        folder = Path(name)
        in_a_process("make", args.preset, folder)
        size = (folder / "released.pt").stat().st_size
        found = {task: in_a_process(task, args.preset, folder) for task in ("load", "convert", "plain")}
    assert found["load"]["sum"] == found["plain"]["sum"], "the two ways must give the same weights"
    figures: dict[str, Any] = {"file bytes": size, "target": TARGET}
    for task, figure in found.items():
        figures[f"{task}: peak memory / file size"] = round(figure["bytes"] / size, 3)
        figures[f"{task}: seconds"] = round(figure["seconds"], 2)
    if args.dry:
        print(json.dumps(figures, indent=1))
    else:
        write_result("loading", {"preset": args.preset, "dtype": "float32"}, 0, figures)


if __name__ == "__main__":
    main()
