"""Cells are trained, measured and written down, one after the other, by as many processes as are called on the sweep.

What is left of a finished cell is OUT/results/NAME.json: all that it was asked to be, and all that it scored. It is
written once and whole; a cell that has one is done, on every machine that has the file. An unfinished run goes on from
its last checkpoint; one that was measured when its process ended is measured again. A process holds the cell that it
works on by a lock (`files.lock`), which ends with it; another goes to the next cell, and waits where there is none.

A run whose loss is not finite is a result as well: it says so, and the others go on.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from consonar import memory
from consonar.components import load_tokenizer
from consonar.config_io import from_dict, to_dict
from consonar.distributed import pick_device
from consonar.errors import NonFiniteLoss, UserError, reading
from consonar.evaluation.inputs import ReferenceSet, in_tokens, open_reference
from consonar.evaluation.results import library_versions
from consonar.evaluation.runs import evaluate_run
from consonar.files.lock import Held, hold
from consonar.files.readers import read_json
from consonar.files.weights import is_component
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.sweeps.contents import Contents, fingerprint, known_to_both, of_run, recorded, tokenizer_of
from consonar.sweeps.inputs import check_inputs
from consonar.sweeps.plan import FREE, Cell, Sweep, check_result, comparable, made_from, plain, run_folder, sha256_of
from consonar.training.config import TrainConfig
from consonar.training.origins import comparable as comparable_run
from consonar.training.run import SESSIONS, train
from consonar.training.tracking import read_metrics

SCHEMA = 1
REMEDY = "remove it to have the cell done anew, or choose another --out"
Say = Callable[[str], None]
Then = Callable[["Place", Cell], None]


@dataclass
class Place:
    """The folder of a sweep, and what its cells share."""

    out: Path
    sweep: Sweep
    say: Say
    targets: dict[tuple[str, str | None, str, bool], ReferenceSet] = field(default_factory=dict)
    """References in tokens, by their names, what of them is held out, the names of the tokenizers, and whether the
    copy rate is wanted."""
    contents: Contents = field(default_factory=Contents)

    def run(self, cell: Cell) -> Path:
        return run_folder(self.out, cell)

    def result(self, cell: Cell) -> Path:
        return self.out / "results" / f"{cell.name}.json"

    def lock(self, cell: Cell) -> Path:
        """Whoever holds this folder works on the cell."""
        return self.out / ".working" / cell.name

    def is_trained(self, cell: Cell) -> bool:
        return is_component(self.run(cell) / "model")


def run_sweep(sweep: Sweep, out: Path, say: Say, then: Then = lambda place, cell: None) -> dict[str, Json]:
    """Does every cell that has no result yet, `then` what else is wanted of it, and returns the results of all by name.

    Raises `UserError` before any work for results and runs in `out` that are of other cells or were made of other
    files, and for token stores, references and feature networks that are missing.
    """
    place = Place(out, sweep, say)
    waiting = [cell for cell in sweep.cells.values() if read_result(place, cell) is None]
    check_begun(place)
    check_contents(place)
    check_inputs(waiting, sweep.file)
    while waiting:
        held: Held | None = None
        for cell in list(waiting):
            with ExitStack() as locks:
                try:
                    needed = hold_needed(place, cell, locks)
                except Held as error:  # another process is at it; there are other cells
                    held = held or error
                    continue
                if read_result(place, cell) is None:  # else done meanwhile
                    say(f"{cell.name}: {len(sweep.cells) - len(waiting)} of {len(sweep.cells)} cells are done")
                    do_cell(place, cell, needed)
                then(place, cell)
            waiting.remove(cell)
            held = None
        if held is not None:
            say(f"waiting: {held}")
            with hold(held.folder, wait=True):
                pass
    return {name: read_json(place.result(cell)) for name, cell in sweep.cells.items()}


def hold_needed(place: Place, cell: Cell, locks: ExitStack) -> list[Cell]:
    """Holds the cell, and those that it needs and that are not trained, which are returned, what others start from
    first. Raises `Held`."""
    needed: dict[str, Cell] = {}

    def add(one: Cell) -> None:
        if one.start and not place.is_trained(one):
            add(one.start)
        if not place.is_trained(one):
            needed.setdefault(one.name, one)

    for one in (cell, *place.sweep.matched(cell)):
        add(one)
    for one in {cell.name: cell, **needed}.values():
        locks.enter_context(hold(place.lock(one)))
    return [one for one in needed.values() if not place.is_trained(one)]


def do_cell(place: Place, cell: Cell, needed: list[Cell]) -> None:
    """Trains what is not trained, measures the cell, and writes its result."""
    figures: Json = {"failure": None}
    try:
        for one in needed:
            try:
                train_cell(place, one)
            except NonFiniteLoss:
                if one not in cell.lineage:  # one that this would be matched to: its own result will say so
                    continue
                raise
        figures |= measure(place, cell)
    except NonFiniteLoss as error:
        place.say(f"{cell.name}: {error}")
        figures["failure"] = str(error)
    asked, rows = cell.asked(), figures.get("results", {}).get("rows", [])
    wanted, found = [other.name for other in place.sweep.matched(cell)], {row.get("matched_to") for row in rows}
    result = {
        "schema": SCHEMA,
        "sweep": place.sweep.name,
        "row": cell.row,
        "seed": cell.seed,
        "config_sha256": sha256_of(asked, cell.name),
        "asked": asked,
        "matched": [name for name in wanted if name in found],
        "not_matched": [name for name in wanted if name not in found],
        "run": f"../runs/{cell.name}",
        "contents": place.contents.of(cell, place.run(cell)),
        **figures,
        "versions": library_versions(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(place.result(cell), result)


def train_cell(place: Place, cell: Cell) -> None:
    """Trains a cell, or goes on with it. Raises `NonFiniteLoss`, at once where that is known of it."""
    if failure := (read_result(place, cell) or {}).get("failure"):
        raise NonFiniteLoss(failure)
    run, steps = place.run(cell), cell.config.loop.steps
    resume = (run / "config.json").exists()
    place.say(f"{cell.name}: " + (f"goes on to step {steps}" if resume else f"trains for {steps} steps"))
    train(cell.config, run, resume=resume, quiet=True)


def measure(place: Place, cell: Cell) -> Json:
    """What a trained cell scores, and what it was made of."""
    run, device = place.run(cell), pick_device(cell.config.loop.device)
    match = [place.run(other) for other in place.sweep.matched(cell) if place.is_trained(other)]
    settings = replace(cell.evaluated.settings, device=str(device), match=match)
    with memory.explained(f"lower evaluate.batch_size ({settings.batch_size})", device):
        content = evaluate_run(
            run, settings, reference=cell.evaluated.reference, feature_network=cell.evaluated.feature_network,
            target=target_of(place, cell, device), overwrite=True, progress=place.say,
        )  # fmt: skip
    lines = read_metrics(run / "metrics.jsonl")
    validated = [line for line in lines if any(key.startswith("validation/") for key in line)]
    return {
        "steps": lines[-1]["step"] if lines else 0,
        "training_seconds": lines[-1].get("time") if lines else None,
        "stopped": read_json(run / "stopped.json") if (run / "stopped.json").exists() else None,
        "validation": {key: value for key, value in (validated or [{}])[-1].items() if key.startswith("validation/")},
        "validations": {line["step"]: line.get("validation/cross_entropy") for line in validated},
        "weights": fingerprint(run),
        "start_weights": fingerprint(place.run(cell.start)) if cell.start else None,
        "sessions": read_json(run / SESSIONS)["sessions"] if (run / SESSIONS).exists() else [],
        "results": content,
    }


def target_of(place: Place, cell: Cell, device: torch.device) -> ReferenceSet:
    """The reference in the tokens of the cell's tokenizer; opened and encoded once for all cells."""
    tokenizer, reference, settings = tokenizer_of(cell), cell.evaluated.reference, cell.evaluated.settings
    key = (reference, settings.validation_split, tokenizer, settings.wants("copy-rate"))
    if key not in place.targets:
        codec = load_tokenizer(tokenizer).to(device)
        opened = open_reference(reference, codec.image_size, validation_split=settings.validation_split)
        place.targets[key] = in_tokens(opened, codec, settings)
    return place.targets[key]


def read_result(place: Place, cell: Cell) -> Json | None:
    """The result of a cell; None where there is none, or it was measured before all that it is to be matched to was
    asked for. `UserError` where the file is of another cell."""
    path = place.result(cell)
    if not path.exists():
        return None
    content = read_json(path, REMEDY)
    with reading(path, "a result of a sweep", REMEDY):
        check_result(content)
        before, row, seed = comparable(content["asked"], str(path)), content["row"], content["seed"]
        matched = {*content["matched"], *content.get("not_matched", ())}
    check_same(path, comparable(cell.asked(), cell.name), before)
    if (row, seed) != (cell.row, cell.seed):
        raise UserError(f"{path}: is of {row}-{seed}; {REMEDY}")
    return content if matched.issuperset(other.name for other in place.sweep.matched(cell)) else None


def check_same(path: Path, now: dict[str, object], before: dict[str, object]) -> None:
    """Raises `UserError` for the first key in which what is asked for and what is there differ."""
    for key in now | before:
        if now.get(key) != before.get(key):
            raise UserError(f"{path}: {key} is {before.get(key)!r} there and {now.get(key)!r} here; {REMEDY}")


def check_begun(place: Place) -> None:
    """Raises `UserError` where the run of a cell was begun with other settings than it has now, or, where it is trained
    and would only be measured, from another start or on other data than those that are named now."""
    for cell in place.sweep.cells.values():
        run = place.run(cell)
        path = run / "config.json"
        if path.exists():
            begun, now = (
                {key: value for key, value in comparable_run(plain(to_dict(config)), run).items() if key not in FREE}
                | (made_from(config, cell) if place.is_trained(cell) else {})
                for config in (from_dict(read_json(path), str(path), TrainConfig), cell.config)
            )
            if cell.config.model is None or cell.config.run == "post-training":
                begun = {key: value for key, value in begun.items() if key.partition(".")[0] != "model"}
                now = {key: value for key, value in now.items() if key.partition(".")[0] != "model"}
            check_same(run, now, begun)


def check_contents(place: Place) -> None:
    """Raises `UserError` where a result, or a run that would only be measured, is known to be of other files than those
    that lie in these places now."""
    for cell in place.sweep.cells.values():
        run, path = place.run(cell), place.result(cell)
        content = read_result(place, cell)
        if content is not None:
            with reading(path, "a result of a sweep", REMEDY):
                before = recorded(content)
        elif place.is_trained(cell):
            path, before = run, of_run(run)
        else:
            continue
        check_same(path, *known_to_both(place.contents.of(cell, run), before))


def states(sweep: Sweep, out: Path) -> dict[str, str]:
    """Every cell: done, failed, begun (and how far), held by whom, or to do. `UserError` as `run_sweep` raises."""
    place = Place(out, sweep, lambda text: None)
    check_begun(place)
    check_contents(place)
    found = {}
    for name, cell in sweep.cells.items():
        result, lines = read_result(place, cell), read_metrics(place.run(cell) / "metrics.jsonl")
        if result is not None:
            found[name] = "failed" if result["failure"] else "done"
        elif place.is_trained(cell):
            found[name] = "trained, not measured"
        else:
            found[name] = f"step {lines[-1]['step']} of {cell.config.loop.steps}" if lines else "to do"
        if place.lock(cell).exists() and result is None:
            try:
                with hold(place.lock(cell)):
                    pass
            except Held as error:
                found[name] += f"; {error}"
    return found
