"""Where a thing comes from: classes, tokenizer, data, start model, each by its content, and one `check` of two of them.

Token stores, models, runs, samples and results carry an `Origin`. What an older folder does not say is None, "unknown",
and differs from nothing.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from consonar.errors import UserError, printable

HASHED_ITEMS = 256
"""Pictures of a folder or data set whose bytes are in its hash, evenly spaced; of all others the names are."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a thing was made of and with; None where that is not known."""

    tokenizer: str | None = None
    """Name or folder of the tokenizer."""
    tokenizer_fingerprint: str | None = None
    class_names: tuple[str, ...] | None = None
    """Name of class 0, 1, ...; None also where classes have numbers only."""
    text_encoder: str | None = None
    """Name or folder of what read the captions."""
    text_encoder_fingerprint: str | None = None
    data: str | None = None
    """Name of the images or tokens."""
    data_sha256: str | None = None
    validation_sha256: str | None = None
    """Of the held-out images or tokens of a run."""
    pictures_sha256: str | None = None
    """Of the images, also where the data are their tokens; without captions."""
    init: str | None = None
    """Name or folder of the start model."""
    init_sha256: str | None = None
    """Of its weights."""


class HasFingerprint(Protocol):
    """A tokenizer, as far as an origin names it."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and weights; token stores carry it."""
        ...


def of_tokenizer(tokenizer: HasFingerprint) -> Origin:
    return Origin(tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint)


PARTS: dict[str, tuple[str, str, str]] = {
    "tokenizer": ("tokenizer", "tokenizer", "tokenizer_fingerprint"),
    "text_encoder": ("text encoder", "text_encoder", "text_encoder_fingerprint"),
    "data": ("data", "data", "data_sha256"),
    "validation": ("validation data", "data", "validation_sha256"),
    "init": ("start model", "init", "init_sha256"),
}
"""What a part is called, the field of its name, and the field of its hash."""
MEANING = ("classes", "tokenizer", "text_encoder")
"""The parts that must agree for two things to be used together: what a label, a token and a caption mean."""


def same_text(name: str) -> str:
    """One spelling of a name, whatever the file system or program composed its accents."""
    return unicodedata.normalize("NFC", name)


def check_distinct(names: Sequence[str] | None, where: str) -> None:
    """Raises `UserError` for two classes of one name, also where only the composition of its accents differs."""
    seen: set[str] = set()
    for name in map(same_text, names or ()):
        if name in seen:
            raise UserError(f"{where}: two classes are called {name!r}; rename one")
        seen.add(name)


def content_hash(names: Sequence[str], read: Callable[[int], bytes]) -> str:
    """SHA-256 of all names and of what `read` returns for up to `HASHED_ITEMS` of them, evenly spaced: the same
    wherever the items lie, without reading a large set."""
    named = hashlib.sha256("\n".join(map(same_text, names)).encode()).hexdigest()
    digest, count = hashlib.sha256(named.encode()), min(HASHED_ITEMS, len(names))
    for index in range(count):
        digest.update(hashlib.sha256(read(index * len(names) // count)).digest())
    return digest.hexdigest()


def class_difference(ours: Sequence[str] | None, theirs: Sequence[str] | None, other: str) -> str | None:
    """The first class that two lists name differently; None where one is unknown or they agree."""
    if ours is None or theirs is None:
        return None
    mine, yours = ([same_text(name) for name in names] for names in (ours, theirs))
    if mine == yours:
        return None
    shared = range(min(len(mine), len(yours)))
    index = next((i for i in shared if mine[i] != yours[i]), len(shared))
    one, two = (repr(printable(names[index])) if index < len(names) else "none" for names in (mine, yours))
    return f"class {index} is {one} ({len(mine)} classes), in {other} it is {two} ({len(yours)})"


def check(where: str, ours: Origin, theirs: Origin, other: str, remedy: str, parts: Sequence[str] = MEANING) -> None:
    """Raises `UserError`, naming where the two differ first, unless all `parts` that both know are the same.

    `where` is the key or file that `ours` belongs to, `other` what `theirs` belongs to; `remedy` ends the line.
    """
    if "classes" in parts and (found := class_difference(ours.class_names, theirs.class_names, other)):
        raise UserError(f"{where}: {found}; {remedy}")
    for what, name, key in (PARTS[part] for part in parts if part != "classes"):
        if None not in (hashes := (getattr(ours, key), getattr(theirs, key))) and hashes[0] != hashes[1]:
            # A part without a name lies in the folder itself.
            named, known = (f"{getattr(o, name) or 'its own'!r} ({getattr(o, key)[:12]})" for o in (ours, theirs))
            raise UserError(f"{where}: the {what} is {named}, in {other} it is {known}; {remedy}")
