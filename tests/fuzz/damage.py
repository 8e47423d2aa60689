"""Damaging files on purpose: every byte changed and every length cut must give success or a `UserError`.

`python -m tests.fuzz` (`make fuzz`) does all of it; a test does an evenly spaced part.
"""

from __future__ import annotations

import faulthandler
import math
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

from fuzz.formats import Format

from consonar.errors import UserError

CHANGES = (0xFF, 0x01, 0x80, 0x20)
"""What a byte is combined with (exclusive or): all bits, the lowest, the highest, and the case of a letter."""
LONGEST = 120.0
"""Seconds after which a reading counts as hanging and ends the process with its traceback."""
MOST = 20_000
"""Damages of a file in all: files of up to 4 kB get every one, of larger ones they are evenly spaced."""
MAX_GROWTH = 1.0
"""GB that the peak of memory may grow by over all readings of a format."""


def damages(data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    """The damaged versions and their names: all, or about `limit` of them, evenly spaced."""
    total = len(data) * (len(CHANGES) + 1)
    step = max(1, math.ceil(total / limit))
    while step > 1 and math.gcd(step, len(CHANGES) + 1) > 1:
        step += 1  # so that each kind of damage has its turn
    for number in range(0, total, step):
        place, kind = divmod(number, len(CHANGES) + 1)
        if kind == len(CHANGES):
            yield f"cut to {place} bytes", data[:place]
        else:
            changed = bytes([data[place] ^ CHANGES[kind]])
            yield f"byte {place} ^ {CHANGES[kind]:#x}", data[:place] + changed + data[place + 1 :]


def peak() -> float:
    """GB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def fuzz(format: Format, folder: Path, limit: int = MOST) -> list[str]:
    """What went wrong, one line each: another exception, a message of several lines, too much memory."""
    folder.mkdir(parents=True, exist_ok=True)
    format.make(folder)
    path, faults = folder / format.file, []
    data = path.read_bytes()
    format.read(folder)  # the file is a valid one, and what is loaded once is loaded
    before = peak()
    for name, damaged in damages(data, limit):
        path.unlink(missing_ok=True)  # a mapped file must not change under those that still read it
        path.write_bytes(damaged)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                format.read(folder)
        except UserError as error:
            message = str(error)
            if not message.isprintable():
                faults.append(f"{name}: the message is not one printable line: {message!r}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}"[:300])
        finally:
            faulthandler.cancel_dump_traceback_later()
    if peak() - before > MAX_GROWTH:
        faults.append(f"the peak of memory grew by {peak() - before:.1f} GB")
    return faults
