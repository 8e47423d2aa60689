"""What the two files of a token store must hold. Arrow follows damaged offsets anywhere, so these are checked, too."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa

from consonar.config_io import from_dict
from consonar.data.labels import MAX_CLASSES
from consonar.errors import NotHere, UserError
from consonar.files.readers import read_json
from consonar.files.writers import no_room
from consonar.options import Count, CountOrZero, Range, check_options
from consonar.origin import check_distinct

FORMAT_VERSION = 1
METADATA_FILE, TOKENS_FILE = "store.json", "tokens.arrow"
REMEDY = "tokenize the images again"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many items there are, and of how many the label and the caption are known."""

    items: int
    labelled: int
    captioned: int


@dataclass(frozen=True, kw_only=True)
class StoreMetadata:
    """What store.json says; None for what older versions did not write, or is not known of imported tokens."""

    format_version: int = FORMAT_VERSION
    consonar_version: str | None = None
    tokenizer: str
    """Its name."""
    fingerprint: str
    """That of the tokenizer."""
    content_sha256: str | None = None
    """See `ContentHash`."""
    views: str | None = None
    """One of `transforms.VIEWS`, or imported."""
    precision: str | None = None
    """What the tokenizer multiplied in."""
    source: str
    """Name of the images, or the file that the tokens were imported from."""
    source_sha256: str | None = None
    """Of the images, where they have an `origin.content_hash`."""
    imported_from: str | None = None
    """The kind of that file."""
    vocab_size: Count
    num_tokens: Count
    num_views: Count
    counts: Counts
    num_classes: Annotated[int, Range(0, MAX_CLASSES)]
    """Without labels 0, without names the largest label plus 1."""
    class_names: tuple[str, ...] | None
    left_out: CountOrZero = 0
    """Images that could not be read, and are no items."""
    enlarged: CountOrZero = 0
    """Images that are smaller than those of the tokenizer."""

    def __post_init__(self) -> None:
        check_options(self, "")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise UserError(f"class_names are not {self.num_classes} names; {REMEDY}")


def read_metadata(folder: Path) -> StoreMetadata:
    """store.json of a token store; `NotHere` where there is no such folder, `UserError` for another version or a
    damaged one."""
    path = folder / METADATA_FILE
    if not path.is_file():
        kind = UserError if folder.exists() else NotHere
        raise kind(f"tokens: no token store at {str(folder)!r}; make one with consonar tokenize")
    content = read_json(path, REMEDY)
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"tokens: {str(folder)!r} has format {version!r}, but this consonar reads {FORMAT_VERSION}")
    known = {field.name: content[field.name] for field in fields(StoreMetadata) if field.name in content}
    metadata = from_dict(known, str(path), StoreMetadata)
    check_distinct(metadata.class_names, str(path))
    return metadata


class ContentHash:
    """SHA-256 of what a store holds, fed in the order of its items: tokens as they lie on disk, labels, captions."""

    def __init__(self) -> None:
        self._tokens, self._told = hashlib.sha256(), hashlib.sha256()

    def update(self, tokens: np.ndarray, labels: Sequence[int | None], captions: Sequence[str | None]) -> None:
        self._tokens.update(tokens.tobytes())
        for item in zip(labels, captions, strict=True):
            self._told.update(f"{item}\n".encode(errors="replace"))

    def hexdigest(self) -> str:
        return hashlib.sha256(self._tokens.digest() + self._told.digest()).hexdigest()


def check_rows(table: pa.Table, counts: Counts) -> None:
    """Raises ValueError unless an Arrow table holds what `counts` says and its buffers lie inside the file; reads the
    names and captions, not the tokens."""
    check_buffers(table, "tokens")
    if len(table) != counts.items:
        raise ValueError(f"{len(table)} of {counts.items} items")
    if table.column("tokens").null_count:
        raise ValueError("items without tokens")
    for column, known in (("label", counts.labelled), ("caption", counts.captioned)):
        found = len(table) - table.column(column).null_count
        if found != known:
            raise ValueError(f"{found} of {known} items have a {column}")


def check_buffers(table: pa.Table, *large: str) -> None:
    """Raises ValueError where columns of an Arrow table point outside their memory; of `large` ones by size alone."""
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            chunk.validate(full=name not in large)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn a failure to write the store `path` into a `UserError` that says how much room it needs (bytes) and has."""
    try:
        yield
    except OSError as error:
        need = f"{needed / 1e6:.1f} MB are needed" if needed >= 1e5 else f"{needed / 1e3:.1f} kB are needed"
        room = f"{need}, {free_room(path) / 1e6:.1f} MB free; nothing was replaced"
        why = no_room(error) or error.strerror or error
        raise UserError(f"out: cannot write {str(path)!r}: {why}; {room}") from error


def free_room(path: Path) -> int:
    """Bytes that are free where `path` is to be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk: uint16 where it holds every token of the vocabulary, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


def check_tokens(tokens: np.ndarray, vocab_size: int, tokenizer_name: str, where: str) -> None:
    """`UserError` for a token outside [0, vocab_size)."""
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < 0 or high >= vocab_size:
        limit = f"{tokenizer_name!r} has 0..{vocab_size - 1}: damaged, or made with another tokenizer?"
        raise UserError(f"{where}: token {low if low < 0 else high}; {limit}")
