"""From a sweep file to its cells, each of which is checked here, before any work.

A row is a recipe (`base`) with options; a grid is the rows of every combination of its lists.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from consonar.config_io import from_dict, merge, to_dict
from consonar.errors import UserError, check_choice, unknown
from consonar.evaluation.runs import RunSettings
from consonar.json_types import Json, JsonMap
from consonar.options import Options, Range, is_whole, started_from
from consonar.recipes import RECIPES, find_recipe, read_table
from consonar.sweeps.plan import OF_CELLS, Cell, Evaluated, Sweep, run_folder
from consonar.training.config import TrainConfig

ROW_KEYS = ("base", "init", "match", "seeds", "evaluate")
"""What a row says beside options."""
MOST_CELLS = 10_000
SAMPLES_OF_A_SEED = 10**6
"""More than a cell draws."""


@dataclass(frozen=True, kw_only=True)
class SweepFile(Options):
    """What a sweep file holds."""

    base: str | None = None
    """The recipe of rows that name none."""
    seeds: Annotated[int, Range(1, MOST_CELLS)] = 1
    """Seeds of every row that does not say how many: 0, 1, ..."""
    options: Json = field(default_factory=dict)
    """Options of every row, by path (`loop.steps`) or in tables, over which a row's own are laid key by key."""
    rows: Json = field(default_factory=dict)
    """Name: a table of options, and of `ROW_KEYS`."""
    grid: Json = field(default_factory=dict)
    """More rows: of every combination of the lists in this table."""
    compare_with: str | None = None
    """The row that the others are compared with; None: the first."""
    evaluate: Json = field(default_factory=dict)
    """`reference`, `feature_network` and the settings of `RunSettings` (temperatures, num_samples, ...)."""


def read_sweep(path: Path, out: Path, seeds: int | None = None) -> Sweep:
    """The cells of a sweep file, whose runs lie in `out`; `seeds` in the place of the file's.

    Raises `UserError`, one line with key, value and choices, for whatever is wrong with the file or any of its cells.
    """
    where = str(path)
    table = read_table(path)
    check_seeds(table.get("seeds", 1), where)
    file = from_dict(table, where, SweepFile)
    file = file if seeds is None else replace(file, seeds=seeds)
    rows = {**file.rows, **grid_rows(file, where)}
    if not rows:
        raise UserError(f"{where}: rows: none are given, and no grid; name some, e.g. rows: {{plain: {{}}}}")
    for name in rows:
        check_row_name(name, rows, where)
    base = next(iter(rows)) if file.compare_with is None else file.compare_with
    check_choice(f"{where}: compare_with", base, rows)
    cells: dict[str, Cell] = {}
    made = Rows(file, rows, where, out, cells)
    most = max(made.seeds(name) for name in rows)
    if most * len(rows) > MOST_CELLS:
        raise UserError(f"{where}: {len(rows)} rows at {most} seeds are over {MOST_CELLS:,} cells")
    for seed in range(most):
        for name in rows:
            if seed < made.seeds(name):
                made.cell(name, seed, ())
    sweep = Sweep(path.stem, cells, tuple(rows), base, where)
    for cell in cells.values():
        for row in cell.match:
            if not any(other.row == row and other.start and other.start.row == cell.row for other in cells.values()):
                raise UserError(f"{where}: rows.{cell.row}.match: no cell of {row!r} starts from {cell.name}")
    return sweep


def check_seeds(seeds: object, where: str) -> int:
    """How many seeds there are; `UserError` for what is no such number, a list of them included."""
    if not is_whole(seeds) or not 1 <= seeds <= MOST_CELLS:
        raise UserError(f"{where}: seeds: {seeds!r} is not a number of seeds (3 is 0, 1 and 2), 1 to {MOST_CELLS}")
    return seeds


def evaluation_of(asked: JsonMap, where: str) -> Evaluated:
    """A table `evaluate`."""
    table = dict(asked)
    names = [item.name for item in fields(RunSettings) if item.name not in OF_CELLS]
    for key in table:
        check_choice(f"{where}: evaluate.{key}", key, ("reference", "feature_network", *names))
    usual = {"reference": "", "feature_network": "efficientnet-lite0"}
    named = {key: table.pop(key, value) for key, value in usual.items()}
    for key, value in named.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: evaluate.{key}: expected a name or path, got {value!r}")
    settings = from_dict(table, f"{where}: evaluate", RunSettings)
    if not settings.temperatures or len(set(settings.temperatures)) < len(settings.temperatures):
        raise UserError(f"{where}: evaluate.temperatures: {settings.temperatures} are not different temperatures")
    if len(set(settings.guidance_scales)) < len(settings.guidance_scales):
        raise UserError(f"{where}: evaluate.guidance_scales: {settings.guidance_scales} are not different")
    return Evaluated(**named, settings=settings)


def grid_rows(file: SweepFile, where: str) -> dict[str, Json]:
    """Name: row, for every combination of the lists in the table `grid`."""
    lists = {key: value for key, value in file.grid.items() if isinstance(value, list)}
    if empty := [key for key, value in lists.items() if not value]:
        raise UserError(f"{where}: grid.{empty[0]}: the list is empty")
    if file.grid and not lists:
        raise UserError(f"{where}: grid: no key has a list of values; give one, or name the row under rows")
    rows: dict[str, Json] = {}
    for values in itertools.product(*lists.values()) if lists else ():
        name = "+".join(map(value_name, lists, values))
        if name in rows or name in file.rows:
            raise UserError(f"{where}: grid: two rows are called {name!r}; name them under rows")
        rows[name] = file.grid | dict(zip(lists, values, strict=True))
    return rows


def value_name(key: str, value: object) -> str:
    """What a value of a grid adds to the name of its row: `schedule=linear`, of a recipe or a cell its name."""
    if isinstance(value, dict):
        text = ",".join(str(value.get("cell", f"{name}={part}")) for name, part in value.items() if name != "seed")
    else:
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = re.sub(r"[^\w.,=+-]+", "-", text).strip("-")
    return text if key in ROW_KEYS else f"{key.rpartition('.')[2]}={text}"


def check_row_name(name: str, rows: Mapping[str, object], where: str) -> None:
    """Raises `UserError` for a name that is no part of a file's name everywhere, and for two that are one somewhere."""
    if not re.fullmatch(r"[\w=+-][\w.,=+-]{0,150}", name):
        raise UserError(f"{where}: rows.{name}: names are of letters, digits and . , = + - _, up to 151")
    if alike := [other for other in rows if other != name and other.casefold() == name.casefold()]:
        raise UserError(f"{where}: rows.{name}: differs from {alike[0]!r} in upper case only")


@dataclass(frozen=True)
class Rows:
    """The rows of a file on their way to cells."""

    file: SweepFile
    rows: dict[str, Json]
    where: str
    out: Path
    cells: dict[str, Cell]
    """Those that were made; a start before what starts from it."""

    def place(self, name: str) -> str:
        """What a row is called in a message."""
        return f"{self.where}: {'rows' if name in self.file.rows else 'grid'}.{name}"

    def tables(self, name: str) -> tuple[Json, Json]:
        """What all rows have, and what the row says over that."""
        if not isinstance(self.rows[name], dict):
            raise UserError(f"{self.place(name)}: expected a table of options, got {self.rows[name]!r}")
        return self.file.options, self.rows[name]

    def table(self, name: str) -> Json:
        """The row, over what all have: for keys whose value is one, no table to join."""
        shared, own = self.tables(name)
        return shared | own

    def seeds(self, name: str) -> int:
        seeds = self.table(name).get("seeds", self.file.seeds)
        return check_seeds(seeds, self.place(name))

    def cell(self, name: str, seed: int, above: tuple[str, ...]) -> Cell:
        """The cell of a row at a seed, made with what it starts from; `above` are the rows that start from it."""
        if found := self.cells.get(f"{name}-{seed}"):
            return found
        if name in above:
            raise UserError(f"{self.place(name)}: init: starts from itself, by way of {' and '.join(above)}")
        table = self.table(name)
        start = self.start_of(name, seed, above)
        config = self.config(name, seed, start)
        match = table.get("match", [])
        if not isinstance(match, list):
            raise UserError(f"{self.place(name)}: match: expected a list of rows, got {match!r}")
        for row in match:
            check_choice(f"{self.place(name)}: match", row, self.rows)
        evaluated = self.evaluated(name)
        # The first sample's seed, and each next one has the next: rows share them, and no two seeds of the sweep have
        # one in common, so that seeds tell how far drawing moves a number.
        evaluated = replace(evaluated, settings=replace(evaluated.settings, seed=seed * SAMPLES_OF_A_SEED))
        made = Cell(name, seed, config, evaluated, start, tuple(match))
        return self.cells.setdefault(made.name, made)

    def evaluated(self, name: str) -> Evaluated:
        """How a row is measured: as all are, but for what it says itself."""
        asked: JsonMap = self.file.evaluate
        for table in self.tables(name):
            own = table.get("evaluate", {})
            if not isinstance(own, dict):
                raise UserError(f"{self.place(name)}: evaluate: expected a table, got {own!r}")
            asked = merge(asked, own)
        return evaluation_of(asked, self.place(name) if own else self.where)

    def start_of(self, name: str, seed: int, above: tuple[str, ...]) -> Cell | None:
        """The cell that `init: {cell: ROW}` means, at the same seed or at that of `seed: N`."""
        init = self.table(name).get("init")
        if not isinstance(init, dict):
            return None
        place = f"{self.place(name)}: init"
        for key in init:
            check_choice(place, key, ("cell", "seed"))
        row, seed = str(init.get("cell")), init.get("seed", seed)
        check_choice(f"{place}.cell", row, self.rows)
        if not is_whole(seed) or not 0 <= seed < self.seeds(row):
            raise UserError(f"{place}.seed: {row!r} has the seeds 0 to {self.seeds(row) - 1}, not {seed!r}")
        return self.cell(row, seed, (*above, name))

    def config(self, name: str, seed: int, start: Cell | None) -> TrainConfig:
        """The configuration of a row at a seed."""
        place, table = self.place(name), self.table(name)
        base = table.get("base", self.file.base)
        if base is None:
            raise UserError(f"{place}: base: no recipe is named, here or for all rows; choices: {', '.join(RECIPES)}")
        check_choice(f"{place}: base", base, RECIPES)
        if "seed" in table:
            raise UserError(f"{place}: seed: {table['seed']!r}; a sweep sets the seed; say how many with seeds")
        init = table.get("init") if start is None else str(run_folder(self.out, start))
        if not isinstance(init, str | None):
            raise UserError(f"{place}: init: expected {{cell: ROW}} or a run folder, got {init!r}")
        recipe = find_recipe(base)
        values: JsonMap = to_dict(recipe)
        for options in self.tables(name):
            for key, value in options.items():
                if key not in ROW_KEYS:
                    values = merge(values, nested(key, value, values, place))
        named = {"recipe": name, "seed": seed} | ({} if init is None else {"init": init})
        with started_from(recipe):
            config = from_dict({**values, **named}, place, TrainConfig)
        if config.run == "tokenizer":
            raise UserError(f"{place}: base: {base!r} trains a tokenizer; a sweep trains generators")
        if config.run == "post-training" and config.init is None:
            raise UserError(f"{place}: init: {base!r} starts from a generator; give a run, or a cell: {{cell: ROW}}")
        return config


def nested(path: str, value: object, config: JsonMap, where: str) -> Json:
    """{"a": {"b": value}} for `a.b`; `UserError` for a path that leads nowhere in the tables of `config`."""
    *sections, name = path.split(".")
    table: object = config
    for index, key in enumerate(sections):
        known = table if isinstance(table, Mapping) else {}
        if key not in known:
            raise unknown(f"{where}: {'.'.join(sections[: index + 1])}", key, known)
        table = known[key]
    found: Json = {name: value}
    for key in reversed(sections):
        found = {key: found}
    return found
