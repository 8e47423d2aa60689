"""The command `sweep`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from consonar.cli import say
from consonar.errors import UserError
from consonar.sweeps.inputs import check_inputs
from consonar.sweeps.page import MARKDOWN, write_summary
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.work import run_sweep, states


@dataclass(frozen=True, kw_only=True)
class Options:
    file: tyro.conf.Positional[Path]
    """The sweep: a YAML file of rows or a grid (docs/sweeps.md)."""
    out: Path | None = None
    """Folder of its runs, results and page (default: runs/ and the name of the file)."""
    seeds: int | None = None
    """How many seeds, in the place of the file's."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the file, list the cells and what is done of each, say what the others lack, and end."""


def command(options: Options) -> None:
    file = options.file
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise UserError(f"sweep: {file}: {what}; name a YAML file, such as sweeps/noise-schedules.yaml")
    out = options.out or Path("runs") / file.stem
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    sweep = read_sweep(file, out, options.seeds)
    if options.dry_run:
        found = states(sweep, out)
        for name, state in found.items():
            say(f"{name}: {state}")
        counts = Counter(map(kind_of, found.values()))
        say(", ".join(f"{count} {state}" for state, count in counts.items()))
        left = [sweep.cells[name] for name, state in found.items() if kind_of(state) not in ("done", "failed")]
        check_inputs(left, sweep.file)
        return
    results = run_sweep(sweep, out, say)
    page = write_summary(sweep, results, out)
    say(f"tables: {out / MARKDOWN}")
    say(f"page: {page}")


def kind_of(state: str) -> str:
    """A state without what it says of one cell."""
    return "begun" if state.startswith(("step ", "trained")) else state.partition(";")[0]
