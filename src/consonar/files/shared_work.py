"""Work in shards that any number of processes share, and that goes on after any of them was ended."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from consonar.errors import UserError
from consonar.files.lock import LOCK_FILE, Beat, Held, Waiting, hold, is_taken, is_unused
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json

RECORD, MADE = "job.json", "made"
"""What a job is, by the names of its settings and, once it is made of the shards, by this that `out` is its own."""


@dataclass(frozen=True, kw_only=True)
class SharedWork:
    """What becomes `out`, from shards that lie in OUT.parts until all are there."""

    out: Path
    settings: Json
    """What the shards depend on; who comes with others is refused."""
    what: str
    """What is made, in words: samples, tokens."""
    unread: Sequence[str] = ()
    """Keys of `settings` that do not matter: where things lie."""
    old: Mapping[str, object]
    """Settings that the records of older versions do not name."""
    patience: float
    """Seconds for which who waits for another process is content to see no sign that it works."""

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return parts_of(self.out)

    def run(
        self,
        shards: Sequence[Path],
        make: Callable[[int, Beat], object],
        finish: Callable[[Beat], object],
        restart: bool = False,
    ) -> None:
        """Calls `make` with the number of every shard, one process at a time (of one that is there it has nothing to
        do), then in the process that ends last `finish`, which makes `out` of the shards. Both call their `Beat` at
        least once in `patience`, else who waits for them takes them for hung.

        Raises `UserError` when the folder holds work of other settings (`restart`: it is removed) or other things, for
        another process that hangs, and where something else came to `out` meanwhile.
        """
        left, is_ours, waiting = dict(enumerate(shards)), False, Waiting(self.patience)
        try:
            while left:  # those that other processes make come up again: they may have ended
                held = None
                for index, path in list(left.items()):
                    with ExitStack() as working:
                        with self.alone():
                            if self.is_done():
                                return
                            self.claim(restart)
                            is_ours = True
                            try:
                                beat = working.enter_context(hold(path.with_suffix("")))
                            except Held as error:
                                held = held or error
                                continue
                        make(index, beat)
                    del left[index]
                if held:
                    waiting.look(held)
            while (still := self.finished(shards, finish)) is not None:
                waiting.look(still)
        except BaseException:
            if is_ours:
                self.remove_unused()
            raise

    def alone(self) -> AbstractContextManager[Beat]:
        """Keeps the others from claiming and finishing."""
        return hold(self.folder, wait=True, patience=self.patience)

    def finished(self, shards: Sequence[Path], finish: Callable[[Beat], object]) -> Held | None:
        """Makes `out` where it is not there; or who still looks at a shard."""
        with self.alone() as beat:
            if not self.is_done():
                for path in shards:
                    try:
                        with hold(path.with_suffix("")):
                            beat()
                    except Held as error:
                        return error
                finish(beat)
                write_json(self.folder / RECORD, {**self.settings, MADE: True})
                remove(self.folder)
        return None

    def is_done(self) -> bool:
        """Whether `out` is there. `UserError` where it is not made of the shards, which still lie there."""
        if is_taken(self.out) and (self.folder / RECORD).exists() and not self.has_made():
            where = f"{self.what} are being made in {self.folder}"
            raise UserError(f"--out: {self.out} came meanwhile; {where}: move it away, and the same command goes on")
        return is_taken(self.out)

    def has_made(self) -> bool:
        """Whether the folder's record says that `out` was made of its shards."""
        with suppress(UserError):
            return read_json(self.folder / RECORD).get(MADE) is True
        return False

    def claim(self, restart: bool) -> None:
        """Makes the folder this job's; `UserError` when it is another's, unless `restart`."""
        record = self.folder / RECORD
        if not record.exists() and not is_unused(self.folder):
            what = f"where unfinished {self.what} would be, holds something else"
            raise UserError(f"--out: {self.folder}, {what}; choose another name")
        change = self.change() if record.exists() else ""
        was_made = record.exists() and self.has_made()  # by a process that was killed while it tidied; it was removed
        if change and not restart:
            what = f"holds unfinished {self.what} of another job ({change})"
            raise UserError(f"--out: {self.folder} {what}; remove it or choose another name")
        if change:
            for path in self.folder.glob("shard_*.*"):  # of the job that is given up
                path.unlink()
        if change or was_made or not record.exists():
            write_json(record, self.settings)

    def change(self) -> str:
        """What is another than in the record of the folder, in words; empty where it is this job's."""
        try:
            before = dict(self.old) | read_json(self.folder / RECORD)
        except UserError:
            return f"its {RECORD} is damaged"
        before.pop(MADE, None)
        now = json.loads(json.dumps(self.settings))  # tuples are lists in JSON
        differ = [key for key in {**now, **before} if now.get(key) != before.get(key)]
        changed = [key for key in differ if key not in self.unread]
        way_out = f": --precision {before['precision']} goes on" if changed == ["precision"] else ""
        return f"another {', '.join(changed)}{way_out}" if changed else ""

    def tidy(self) -> None:
        """Removes this job's shards beside a finished `out`: its last process was ended while it did."""
        if is_taken(self.out) and self.has_made() and not self.change():
            remove_shards(self.out)

    def remove_unused(self) -> None:
        """Removes the folder where no shard was made, so that other settings find no trace of these."""
        with suppress(Held), hold(self.folder):
            if {path.name for path in self.folder.iterdir()} == {LOCK_FILE, RECORD}:
                shutil.rmtree(self.folder)


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def remove_shards(out: Path) -> None:
    """Removes OUT.parts where it is there, and no process at it."""
    if parts_of(out).is_dir():
        with suppress(Held), hold(parts_of(out)):
            remove(parts_of(out))


def remove(folder: Path) -> None:
    """The shards, then the record: what a removal that fails leaves is this job's."""
    for path in folder.iterdir():
        if path.name not in (LOCK_FILE, RECORD):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder)
