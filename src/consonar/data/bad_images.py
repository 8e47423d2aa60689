"""Pictures that cannot be read: a job stops at the first, or leaves them out, counts them and lists them.

Which ones are left out is found by decoding every picture once before the job begins. The job itself sees a source
without them, so that rows, labels and counts mean the same throughout, and again when it is resumed from the list.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from consonar.data.picture_files import decoding_threads
from consonar.data.sources import Part, Stream
from consonar.errors import BadImage, UserError, reading
from consonar.files.writers import write_atomically
from consonar.json_types import Json
from consonar.types import ImageRecord, ImageSource, IndexedSource

POLICIES = ("stop", "skip")
LIMIT = 0.01
MOST_LISTED = 10_000
"""Pictures of a store that its list names."""
BEHIND = r" \(and {} more pictures behind it\)"
STREAM_START = 1000
"""Pictures of a stream, whose number is not known, that the limit is a share of before more have been read."""


class BadImages:
    """What a job does about pictures that cannot be read, and which ones those were, by part (split) and row.

    `limit` is the share of a part beyond which `skip` stops too (one picture is always allowed). `listing` is the file
    that `write` makes. Where it is there already and `resume` is set, it says what is left out: nothing is decoded.
    Raises `UserError` where something else is there.
    """

    def __init__(
        self, policy: str = "stop", limit: float = LIMIT, listing: Path | None = None, *, resume: bool = False
    ):
        self.skips, self.limit, self.listing = policy == "skip", limit, listing
        self.found: dict[str, dict[int, str]] = {}
        self.totals: dict[str, int] = {}
        self.load()
        if not resume:  # what a command like this one listed before
            self.totals, self.found = {}, {}

    def load(self) -> None:
        """Takes the list for granted, where there is one."""
        if not (self.skips and self.listing is not None and self.listing.exists()):
            return
        totals, found = dict[str, int](), dict[str, dict[int, str]]()
        with reading(self.listing, "a list of pictures that are left out", "it is not replaced: move it away"):
            for line in self.listing.read_text(encoding="utf-8").splitlines():
                part, number, reason = line.split("\t", 2)
                if part not in totals:
                    totals[part], found[part] = int(number), {}
                else:
                    found[part][int(number)] = reason
        self.totals, self.found = totals, found

    def forget(self, part: str) -> None:
        """Before a part is looked at anew."""
        self.totals.pop(part, None)
        self.found.pop(part, None)

    def record(self, part: str, total: int, found: dict[int, str]) -> None:
        """What was left out of a part, beyond `MOST_LISTED` by its number only, beside what is listed of others."""
        self.load()
        if len(found) > MOST_LISTED:
            rest = len(found) - MOST_LISTED
            found = dict(sorted(found.items())[:MOST_LISTED])
            found[max(found)] += BEHIND.replace("\\", "").format(f"{rest:,}")
        self.totals[part], self.found[part] = total, found
        if self.note or (self.listing and self.listing.exists()):
            self.write()

    def met(self, part: str, row: int, error: BadImage, total: int) -> None:
        """Notes one of `total` pictures (so far); `UserError` beyond the limit."""
        found = self.found.setdefault(part, {})
        found[row] = str(error)
        if len(found) > max(1, math.floor(self.limit * total)):
            raise UserError(
                f"bad images: {len(found)} of {total} pictures cannot be read, more than the share of {self.limit:g} "
                f"that may be left out (bad-images-limit); the last one: {error}"
            )

    @property
    def note(self) -> str:
        """ "2 of 1,000 pictures cannot be read and are left out: LIST", or "" where there are none."""
        reasons = [reason for found in self.found.values() for reason in found.values()]
        if not reasons:
            return ""
        where = str(self.listing) if self.listing else "; ".join(reasons[:3])
        behind = [re.search(BEHIND.format(r"([\d,]+)"), reason) for reason in reasons]
        count = len(reasons) + sum(int(more[1].replace(",", "")) for more in behind if more)
        return f"{count:,} of {sum(self.totals.values()):,} pictures cannot be read and are left out: {where}"

    def write(self) -> None:
        """The list: of each part a line with the number of its pictures, then a line with row and reason for each."""
        if self.listing is None or not self.skips:
            return
        text = ""
        for part, total in self.totals.items():
            text += f"{part}\t{total}\tpictures\n"
            text += "".join(f"{part}\t{row}\t{reason}\n" for row, reason in sorted(self.found.get(part, {}).items()))
        write_atomically(self.listing, lambda path: path.write_text(text, encoding="utf-8"))


def bad_images_record(*policies: BadImages | None) -> Json:
    """For a file of results: the limit and how many pictures were left out, by part; nothing where a job stops at the
    first."""
    skipping = [bad for bad in policies if bad is not None and bad.skips]
    left_out = {part: len(found) for bad in skipping for part, found in bad.found.items()}
    return {"limit": float(max(bad.limit for bad in skipping)), "left_out": left_out} if skipping else {}


def readable_rows(read: Callable[[int], object], count: int, bad: BadImages, part: str) -> list[int]:
    """The rows 0..count - 1 that `read` can read, from several threads, rising; the others are noted in `bad`.

    Raises `UserError` where none can, and where an earlier list is of another number of pictures.
    """

    def error_of(row: int) -> BadImage | None:
        try:
            read(row)
            return None
        except BadImage as error:
            return error

    if bad.totals.setdefault(part, count) != count:
        before = bad.totals[part]
        raise UserError(f"{bad.listing}: the {part} images were {before} and are {count} now; begin anew elsewhere")
    if part not in bad.found:
        bad.found[part], pool = {}, decoding_threads()
        try:
            for row, error in enumerate(pool.map(error_of, range(count))):
                if error is not None:
                    bad.met(part, row, error, count)
        finally:
            pool.shutdown(cancel_futures=True)
    rows = [row for row in range(count) if row not in bad.found[part]]
    if not rows:
        raise UserError(f"bad images: none of the {count} {part} images can be read")
    return rows


def readable(source: ImageSource, bad: BadImages, part: str) -> Iterator[ImageRecord]:
    """The pictures of a stream without those that cannot be read."""
    records = iter(source)
    for row in itertools.count():
        record = None
        try:
            record = next(records)
        except StopIteration:
            return
        except BadImage as error:
            bad.met(part, row, error, max(row + 1, STREAM_START))
        bad.totals[part] = max(row + 1, bad.totals.get(part, 0))
        if record is not None:
            yield record


def leave_out(source: ImageSource, bad: BadImages | None, part: str) -> ImageSource:
    """The source without its pictures that cannot be read, where `bad` says `skip`; else the source itself."""
    if bad is None or not bad.skips:
        return source
    if not isinstance(source, IndexedSource):
        return Stream(source.name, source.class_names, lambda: readable(source, bad, part))
    rows = readable_rows(source.read, len(source), bad, part)
    return source if len(rows) == len(source) else Part(source, rows, source.name)
