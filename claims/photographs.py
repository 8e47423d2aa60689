# ruff: noqa: E501  (the sentences of the page)
"""What the articles' parts do on photographs, over seeds: python claims/photographs.py [--profile gpu] [--page].

A sweep (claims/photographs.yaml; docs/sweeps.md) whose results, a small file for every finished run, lie in claims/results
and are committed: it goes on where it was interrupted, and on another machine with the runs that it lacks. Then the
section of docs/results.md is written from those that are there; every number of it comes from these files.

The profile `cpu` trains on a part of CIFAR-10, drawn by seed, `gpu` (claims/photographs-gpu.yaml) on all of it.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from consonar.components import load_tokenizer
from consonar.cpu import hold_memory
from consonar.data.cifar10 import HUB, VARIABLE, cifar10_place
from consonar.data.huggingface import DatasetImages
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.diagnostics.diagnose import diagnose
from consonar.diagnostics.subject import DiagnosisSettings
from consonar.distributed import pick_device
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.files.readers import read_json
from consonar.files.writers import write_atomically, write_json
from consonar.json_types import Json
from consonar.metrics import metric_of
from consonar.report.records import measurement_text
from consonar.seeding import generator, permutation
from consonar.sweeps.page import HOW_TO_READ, difference_rows, named, protocol_lines, table
from consonar.sweeps.plan import Evaluated, Sweep
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.summary import (
    BEST,
    ONE_START,
    Setting,
    Summary,
    judge,
    notes_of,
    over_seeds,
    summarise,
    value_cells,
)
from consonar.sweeps.work import Place, Then, read_result, run_sweep
from consonar.types import ImageSource, Tokenizer

HERE = Path(__file__).parent
NAMES = {"cpu": "photographs", "gpu": "photographs-gpu"}
PART = {"train": 2500, "test": 2500}
"""Pictures of each split of CIFAR-10 in the profile `cpu`."""
PERTURBED = 256
"""Pictures whose tokens are perturbed, for pFID."""
FD, ENTROPY = "FD(efficientnet-lite0)", "entropy (teacher-forced)"
TITLES = {
    "photographs": (
        "The articles' parts on photographs",
        f"Made by `make claims`: {PART['train']:,} photographs of CIFAR-10 to train on and {PART['test']:,} others held out, so few "
        "that plain AR overfits within minutes of a CPU: its cross-entropy of held-out tokens rises again, as the tables say.",
    ),
    "photographs-gpu": (
        "The articles' parts on CIFAR-10, at size",
        "Made by `make claims PROFILE=gpu`: all of CIFAR-10, the split `test` held out.",
    ),
}
SAID = {
    "ahead": "agrees",
    "behind": "the other way",
    "no difference": "undecided",
    "open": "one seed, open",
    ONE_START: ONE_START,
}
COLUMNS = (
    f"{FD} validation",
    f"{FD} train",
    f"KID({FD[3:-1]}) validation",
    "precision",
    "recall",
    "copy rate (features)",
    "copy rate (tokens)",
)
GROUPS = {
    "Training": (r"[^+]*", "plain"),
    "Post-training of plain AR": (r"plain\+.*(?<!-long)", "plain+ce"),
    "Post-training of plain AR of the other seed": (r"plain-1\+.*", "plain-1+ce"),
    "Post-training of plain AR, of two and a half times the updates": (r"plain\+.*-long", "plain+ce-long"),
    "Post-training of reAR": (r"rear\+.*", "rear+ce"),
}
"""Heading: the names of its rows, and what they are compared with, the control of as many updates."""
ARTICLES = (
    ("reAR beats plain AR", "3.02 → 1.86", "rear", "plain"),
    ("both parts beat the embedding alone", "2.12 → 2.00", "rear", "embedding"),
    ("both parts beat the noise alone", "2.18 → 2.00", "rear", "noise"),
    ("a truncated schedule beats a linear one", "2.02 → 2.00", "rear", "rear-linear"),
    ("an annealed rate beats rates from 0 to 0.5 throughout", "2.05 → 2.02", "rear-linear", "rear-uniform"),
    ("drawn rates beat a constant one", "2.08 → 2.05", "rear-uniform", "rear-constant"),
    ("the decode head at ¾ of the depth beats an early layer", "figures not in our copy", "rear", "rear-decode-early"),
    ("and the last layer", "figures not in our copy", "rear", "rear-decode-last"),
    (
        "the embedding term beats a codebook tied to the token embedding",
        "figures not in our copy",
        "embedding",
        "plain-tied",
    ),
    ("a larger reAR is better", "2.00 → 1.86", "rear-wide", "rear"),
    ("VA-pi beats its start", "15.55 → 9.23", "plain+vapi", "plain"),
    ("VA-pi beats as much cross-entropy", "not measured", "plain+vapi", "plain+ce"),
)
"""What the articles say, their FID, and which of our rows is to be below which. reAR (arXiv 2510.04450): ImageNet, with
guidance, 1.86 of L, else S; VA-pi (arXiv 2512.19680): LlamaGen-XL on ImageNet, no guidance."""


def prepare(profile: str, sweep: Sweep, out: Path) -> None:
    """The pictures and the tokens of a profile, where they are not there yet, and pFID of the tokenizer. `UserError`
    where those that are there are of another copy of CIFAR-10 than the one that is named."""
    folder, data = Path("runs") / NAMES[profile], "cifar10"
    if profile == "cpu":
        data = f"cifar10:{folder / 'data'}"
        for split, count in PART.items():
            make_part(split, count, folder / "data" / f"{split}-00000-of-00001.parquet")
    tokenizer = load_tokenizer("cifar10-32").to(pick_device())
    for split, name, views in (("train", "tokens", "center_flip"), ("test", "tokens-validation", "center")):
        source = open_source(data, split=split, image_size=tokenizer.image_size)
        make_store(folder / name, source, tokenizer, views)
    forgiveness(out / "tokenizer.json", next(iter(sweep.cells.values())).evaluated)


def make_part(split: str, count: int, path: Path) -> None:
    """So many pictures of a split, the same ones wherever they are drawn from the same copy. Those that are there are
    compared with them, but where the copy is the hub's and cannot be had."""
    from datasets import Image

    place = cifar10_place("")
    try:
        whole = open_source("cifar10", split=split, image_size=32)
    except UserError as error:
        if place != HUB or not path.exists():
            raise
        print(f"{path}: is kept, and not compared with the copy of the hub ({error})")
        return
    assert isinstance(whole, DatasetImages)  # a split of a data set, not streamed
    rows = sorted(permutation(generator(0, "claims", split), len(whole))[:count].tolist())
    part = whole.dataset.select(rows).cast_column(whole.columns.image, Image())
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: part.to_parquet(partial))
        return
    there = open_source(f"cifar10:{path.parent}", split=split, image_size=32)
    check_made_of(path.parent, getattr(there, "content_hash", None), DatasetImages(part, f"{place} ({VARIABLE})", {}))


def make_store(path: Path, source: ImageSource, tokenizer: Tokenizer, views: str = "center") -> None:
    """The tokens of these pictures, where they are not there yet."""
    if not path.exists():
        write_token_store(path, source, tokenizer, views=views)
    check_made_of(path, TokenStore.open(path).metadata.source_sha256, source)


def check_made_of(path: Path, content: str | None, source: ImageSource) -> None:
    """Raises `UserError` where it is known to be of another content than the source has now."""
    now = getattr(source, "content_hash", None)
    if None not in (content, now) and content != now:
        raise UserError(f"{path}: is of other pictures than {source.name} has; move {path.parent} away, or name those")


def forgiveness(path: Path, evaluated: Evaluated) -> None:
    """pFID (docs/diagnostics.md), which is the tokenizer's: one for all rows."""
    if not path.exists():
        settings = DiagnosisSettings(
            num_images=PERTURBED, feature_network=evaluated.feature_network, device=str(pick_device())
        )
        found = diagnose("cifar10-32", evaluated.reference, settings, parts=["forgiveness"])
        write_json(path, found.content())


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


def at_best(summary: Summary) -> Setting | None:
    """Every row at its best temperature, also where there is one temperature alone; None where no run has numbers."""
    grid = (setting for setting in summary.settings if setting.temperature is not None)
    return next((setting for setting in summary.settings if setting.title == BEST), next(grid, None))


def group_lines(
    summary: Summary, results: dict[str, Json], columns: Sequence[str] | None = None, frontier_of: str = ""
) -> list[str]:
    """Cross-entropy, every row at its best temperature, all temperatures, and the differences of the best.

    `columns`: the metrics (None: `COLUMNS`), of which the first two make the frontier, called `frontier_of`.
    """
    columns = COLUMNS if columns is None else columns
    frontier_of = frontier_of or f"{FD} to held-out / to training photographs"
    grid, best = [setting for setting in summary.settings if setting.temperature is not None], at_best(summary)
    if best is None:
        return ["None of its runs ended with a number."]
    kept = replace(
        best, values={row: {key: of[key] for key in columns if key in of} for row, of in best.values.items()}
    )
    headings = [metric_of(column).heading for column in columns]
    forced = {named(row, grid[0]): loss_cells(summary, row, results) for row in kept.values}
    frontier = {
        named(row, grid[0]): [" / ".join(value_cells(setting, row, columns[:2])) for setting in grid]
        + value_cells(next((one for one in grid if ENTROPY in one.values.get(row, {})), grid[0]), row, [ENTROPY])
        for row in kept.values
    }
    at = [setting.title.removeprefix("at temperature ") for setting in grid]
    lines = [
        f"{frontier_of} by temperature, and {ENTROPY} at {at[0]}:",
        "", *table([*at, ENTROPY], frontier), "", *protocol_lines(summary),
        "Each row at its own best temperature:",
        "", *table(headings, {named(row, kept): value_cells(kept, row, columns) for row in kept.values}), "",
        *protocol_lines(summary),
        "Cross-entropy of held-out tokens, clean context:",
        "", *table(["at the end", "lowest on the way", "at step"], forced),
    ]  # fmt: skip
    if differences := difference_rows(kept, columns):
        lines += [
            "",
            "Differences, seed by seed, each at its own best temperature:",
            "",
            *table(headings, differences),
            "",
            *protocol_lines(summary),
        ]
    return lines


def loss_cells(summary: Summary, row: str, results: dict[str, Json]) -> list[str]:
    """At the end, lowest, and at which step that was, over the seeds of a row."""
    scored = [results[name] for name, cell in summary.sweep.cells.items() if cell.row == row and name in results]
    curves = [result["validations"] for result in scored if not result["failure"]]
    curves = [found for curve in curves if (found := {step: of for step, of in curve.items() if of is not None})]
    if not curves:
        return ["–"] * 3
    lowest = [min(curve, key=lambda step: curve[step]) for curve in curves]
    ends = dict(enumerate(list(curve.values())[-1] for curve in curves))
    least = dict(enumerate(curve[step] for curve, step in zip(curves, lowest, strict=True)))
    return [measurement_text(over_seeds(ends)), measurement_text(over_seeds(least)), ", ".join(lowest)]


def article_rows(sweep: Sweep, results: dict[str, Json]) -> dict[str, list[str]]:
    """What an article says: its numbers; our difference at temperature 1 and at the best, each with its verdict."""
    found = {}
    for claim, figures, row, base in ARTICLES:
        if row not in sweep.rows or base not in sweep.rows:
            continue
        summary = part_of(sweep, results, [base, row], base)
        judged = {setting.title: judge(setting.differences(row).get(COLUMNS[0]), -1) for setting in summary.settings}
        cells = [judged.get(title) for title in ("at temperature 1", BEST)]
        found[claim] = [
            figures,
            f"{row} − {base}",
            *(f"{one.text}: {SAID[one.word]}" if one and one.text else "–" for one in cells),
        ]
    return found


def opening(name: str, title: tuple[str, str], sweep: Sweep, results: dict[str, Json], out: Path) -> list[str]:
    """What a section begins with: what was done, how much of it is there and where, on what."""
    place = (out.relative_to(HERE.parent) if out.is_relative_to(HERE.parent) else out).as_posix()
    cells, settings = sweep.cells.values(), next(iter(sweep.cells.values())).evaluated
    done = {row: sum(cell.row == row and cell.name in results for cell in cells) for row in sweep.rows}
    wanted = {row: sum(cell.row == row for cell in cells) for row in sweep.rows}
    machines = sorted(
        {
            f"{one['results']['machine']} (torch {one['versions']['torch']})"
            for one in results.values()
            if not one["failure"]
        }
    )
    minutes = sum(one["training_seconds"] or 0 for one in results.values() if not one["failure"]) / 60
    return [
        f"## {title[0]}", "", f"{title[1]} `claims/{name}.yaml` says what every row is.", "",
        f"**{len(results)} of {len(cells)} runs have a result** (`{place}/results`), {minutes:.0f} minutes of training on {' and '.join(machines) or 'no machine yet'}. "
        f"Not there: {', '.join(f'{row} ({wanted[row] - done[row]} of {wanted[row]})' for row in sweep.rows if done[row] < wanted[row]) or 'none'}.",
        f"{settings.settings.num_samples:,} samples a setting, the same conditions and random numbers for all rows of a seed. `{FD}` is not FID. {HOW_TO_READ}",
    ]  # fmt: skip


def note_lines(sweep: Sweep, results: dict[str, Json]) -> list[str]:
    """Of the whole study: what its groups say, a start of another group trained again among it."""
    return ["", *(f"- {note}" for note in notes_of(sweep, results))]


def groups(sweep: Sweep, results: dict[str, Json]) -> dict[str, Summary]:
    """By the headings of `GROUPS`, what their rows say that have results."""
    done = {cell.row for name, cell in sweep.cells.items() if name in results}
    found = {}
    for heading, (names, base) in GROUPS.items():
        rows = [row for row in sweep.rows if re.fullmatch(names, row) and row in done]
        if rows:
            found[heading] = part_of(sweep, results, rows, base if base in rows else rows[0])
    return found


def page(name: str, sweep: Sweep, results: dict[str, Json], out: Path) -> str:
    """The section of docs/results.md."""
    lines = opening(name, TITLES[name], sweep, results, out) + note_lines(sweep, results)
    for heading, summary in groups(sweep, results).items():
        lines += [
            "",
            f"### {heading}",
            "",
            *group_lines(summary, results),
        ]
    if (path := out / "tokenizer.json").exists():
        known = read_json(path)
        count, said = known["provenance"]["pictures"]["held-out"]["count"], known["parts"]["forgiveness"]["summary"]
        lines += [
            "",
            "### pFID of the tokenizer, the same for all rows",
            "",
            f"Of {count} held-out photographs: {said}",
        ]
    articles = article_rows(sweep, results)
    lines += [
        "",
        "### Beside the articles",
        "",
        *table(["FID in the article", "ours", "FD at temperature 1", "FD, each at its best"], articles),
    ]
    return "\n".join(lines)


def write_section(name: str, text: str) -> None:
    """Puts it into docs/results.md in the place of what was there."""
    path, section = HERE.parent / "docs" / "results.md", f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    marked = re.compile(f"<!-- {name} -->.*<!-- /{name} -->", re.DOTALL)
    with hold(path.with_name(f".{path.name}.writing"), wait=True):  # another study may be at its own section
        before = path.read_text(encoding="utf-8")
        after = marked.sub(lambda _: section, before) if marked.search(before) else f"{before}\n{section}\n"
        write_atomically(path, lambda partial: partial.write_text(after, encoding="utf-8"))


@contextmanager
def one_line() -> Iterator[None]:
    """Around a study's command: a mistake of the user's is a line and status 2, as in consonar's own."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


@one_line()
def run(
    about: str | None,
    names: Mapping[str, str],
    prepare: Callable[[str, Sweep, Path], None],
    page: Callable[[str, Sweep, dict[str, Json], Path], str],
    then: Then = lambda place, cell: None,
) -> None:
    """The command of a study: `prepare` what its profile needs, do its cells, `then` what else each wants, also where
    an ended process left that out, and write its `page`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(names), default="cpu", help="which machine it is sized for")
    parser.add_argument(
        "--page", action="store_true", help="write the section from the results that are there, run nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results and runs (default: claims/results and the study), as for other pictures",
    )
    options = parser.parse_args()
    name = names[options.profile]
    file, out = HERE / f"{name}.yaml", options.out or HERE / "results" / name
    sweep = read_sweep(file, out)
    if not options.page:
        hold_memory()
        with hold(out / ".working" / "preparing", wait=True):  # several processes may share a study
            prepare(options.profile, sweep, out)
        place = Place(out, sweep, lambda text: print(text, flush=True))
        run_sweep(sweep, out, place.say, then)
        for cell in sweep.cells.values():
            with hold(place.lock(cell), wait=True):
                then(place, cell)
    write_section(name, page(name, sweep, results_of(sweep, out), out))


def main() -> None:
    run(__doc__, NAMES, prepare, page)


if __name__ == "__main__":
    main()
