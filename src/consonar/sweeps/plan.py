"""A sweep file becomes cells: runs with everything that they depend on, each checked before any work.

A row is a recipe with options; a cell is a row at a seed. What a cell is asked to be is a nested table (`asked`), in
which the cell that it starts from stands in the place of that run's folder. Two cells are the same where these tables
are; a table of an older version has the defaults of options that are newer.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from consonar.config_io import adapter, from_dict, to_dict
from consonar.evaluation.results import Row
from consonar.evaluation.runs import RunSettings
from consonar.json_types import Json, JsonMap
from consonar.model_folders import from_anywhere
from consonar.training.config import TrainConfig
from consonar.training.origins import OF_MEMORY, PLACES, flat

OF_CELLS = ("device", "seed", "match")
"""Settings of an evaluation that follow from the cell."""
ELSEWHERE = OF_MEMORY | {"loop.device", "loop.trackers", "batch_size", "init"}
"""What may differ between machines that work on one sweep."""
FILLED = ("tokenizer", "text_encoder", "data.validation_tokens")
"""Settings that a run fills in when it begins, where they were left open."""
FREE = {*FILLED, "init", "loop.device", "loop.trackers"}
"""Settings that may be others when a run goes on, which compares what it is made of by content."""


@dataclass(frozen=True)
class Evaluated:
    """How every cell is measured."""

    reference: str
    feature_network: str
    settings: RunSettings

    def asked(self) -> Json:
        """What a result says of it."""
        settings = {key: value for key, value in to_dict(self.settings).items() if key not in OF_CELLS}
        return {"reference": self.reference, "feature_network": self.feature_network, **settings}


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: str
    seed: int
    config: TrainConfig
    """With the folder of `start` as `init`."""
    evaluated: Evaluated
    start: "Cell | None" = None
    match: tuple[str, ...] = ()
    """Rows whose cells that start from this one are matched by it in entropy."""

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}"

    @property
    def lineage(self) -> list["Cell"]:
        """The cell, and what it starts from."""
        return [self, *(self.start.lineage if self.start else ())]

    def asked(self) -> Json:
        """What this cell is, and was when its result was written."""
        return {**self.trained(), "evaluate": self.evaluated.asked(), "match": list(self.match)}

    def trained(self) -> Json:
        """What its training is."""
        start = self.start and {"cell": self.start.name, **self.start.trained()}
        config = to_dict(self.config) | ({"init": self.start.name} if self.start else {})
        return {"config": config, "start": start}


@dataclass(frozen=True)
class Sweep:
    """All cells, those that others start from before them, and one seed of all rows before the next."""

    name: str
    cells: dict[str, Cell]
    rows: tuple[str, ...]
    """As in the file."""
    compare_with: str
    file: str
    """Where it stands."""

    def matched(self, cell: Cell) -> list[Cell]:
        """The cells whose entropies `cell` is also measured at."""
        return [other for other in self.cells.values() if other.row in cell.match and other.start is cell]

    def partners(self, row: str, base: str) -> list[tuple[int, int]]:
        """Seeds of two rows between which differences are taken: of every run and that of the other row that it started
        from, by whatever way; of rows that have no such runs, equal ones. What is trained from nothing and what is
        post-trained have a seed in common only where that is also the seed of the training that the latter began with.
        """
        of_rows = ([cell for cell in self.cells.values() if cell.row == name] for name in (row, base))
        every = list(itertools.product(*of_rows))
        pairs = [pair for pair in every if pair[1] in pair[0].lineage or pair[0] in pair[1].lineage]
        if not pairs:
            equal = [pair for pair in every if pair[0].seed == pair[1].seed]
            pairs = [
                (one, other)
                for one, other in equal
                if (one.config.init is None) == (other.config.init is None)
                or one.lineage[-1].seed == other.lineage[-1].seed
            ]
        return [(one.seed, other.seed) for one, other in pairs]

    def of_one_start(self, row: str, base: str) -> bool:
        """Whether several runs of one of two rows have the same partner: the one run that they started from."""
        pairs = self.partners(row, base)
        return len(pairs) > 1 and any(len(set(seeds)) == 1 for seeds in zip(*pairs, strict=True))


def comparable(asked: JsonMap, where: str) -> dict[str, object]:
    """What `Cell.asked` gave, now or in a file of an older version, by dotted key, without what is `ELSEWHERE`."""

    def of_training(table: JsonMap, prefix: str) -> Iterator[tuple[str, object]]:
        config = to_dict(from_dict(table["config"], where, TrainConfig))
        left_out = ELSEWHERE if table["start"] else ELSEWHERE - {"init"}
        yield from ((f"{prefix}{key}", value) for key, value in flat(config, "") if key not in left_out)
        if table["start"]:
            yield f"{prefix}start", table["start"]["cell"]
            yield from of_training(table["start"], f"{prefix}start.")

    measured = dict(asked["evaluate"])
    named = {key: measured.pop(key) for key in ("reference", "feature_network")}
    settings = {key: value for key, value in measured.items() if key not in ELSEWHERE}
    settings = to_dict(from_dict(settings, where, RunSettings))
    kept = {key: value for key, value in settings.items() if key not in (*OF_CELLS, *ELSEWHERE)}
    found = dict(of_training(asked, "")) | dict(flat({**named, **kept, "match": asked["match"]}, "evaluate."))
    return plain(found)


def made_from(config: TrainConfig, cell: Cell) -> dict[str, object]:
    """By which names a configuration calls what a run is made of, but for what `cell` leaves open; a start that is a
    cell by its own."""
    asked, given = (dict(flat(to_dict(one), "")) for one in (cell.config, config))
    found = {key: given[key] for key in PLACES if key not in FILLED or asked[key] is not None}
    if config.init is not None:
        found["init"] = Path(config.init).name if cell.start else from_anywhere("generator", config.init)
    return found


def plain(table: Json) -> Json:
    """As it would come from a file: tuples are lists in JSON."""
    read: Json = json.loads(json.dumps(table))
    return read


def sha256_of(asked: JsonMap, where: str) -> str:
    """Of what `comparable` compares."""
    return hashlib.sha256(json.dumps(comparable(asked, where), sort_keys=True).encode()).hexdigest()


def run_folder(out: Path, cell: Cell) -> Path:
    """Where a cell is trained."""
    return out / "runs" / cell.name


@dataclass(frozen=True)
class Scores:
    """What is read of a cell's results."""

    rows: Annotated[list[Row], Field(min_length=1)]
    machine: str
    reference: Json
    remarks: list[str]


@dataclass(frozen=True)
class Stopped:
    """Where and why a guard ended a run."""

    step: int
    reason: str


@dataclass(frozen=True)
class Versions:
    """Of what a cell was calculated by."""

    torch: str


@dataclass(frozen=True)
class Result:
    """What is read of OUT/results/NAME.json."""

    row: str
    seed: int
    asked: Json
    matched: list[str]
    config_sha256: str
    versions: Versions
    failure: str | None


@dataclass(frozen=True)
class Measured(Result):
    """The same where the run did not fail."""

    weights: str
    start_weights: str | None
    stopped: Stopped | None
    validation: dict[str, float | None]
    results: Scores


def check_result(content: JsonMap) -> None:
    """Raises ValueError for what is no result: of a run that failed, or with numbers."""
    adapter(Result if content.get("failure") else Measured).validate_python(content)
