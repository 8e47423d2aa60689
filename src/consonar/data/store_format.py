"""What the two files of a token store must hold. Arrow follows damaged offsets anywhere, so these are checked, too."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from consonar.data.labels import MAX_CLASSES
from consonar.errors import UserError
from consonar.files.readers import read_json
from consonar.origin import check_distinct

FORMAT_VERSION = 1
METADATA_FILE, TOKENS_FILE = "store.json", "tokens.arrow"
REMEDY = "tokenize the images again"
SIZES = ("vocab_size", "num_tokens", "num_views")
TYPES: dict[str, Any] = {
    "tokenizer": str, "fingerprint": str, "source": str, "num_classes": int, "class_names": (list, NoneType),
    "counts": dict, **dict.fromkeys(SIZES, int),
}  # fmt: skip


def read_metadata(folder: Path) -> dict[str, Any]:
    """store.json of a token store, its entries of the right types; `UserError` for another version or a damaged one."""
    path = folder / METADATA_FILE
    if not path.is_file():
        raise UserError(f"tokens: no token store at {str(folder)!r}; make one with consonar tokenize")
    metadata = read_json(path, REMEDY)
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"tokens: {str(folder)!r} has format {version!r}, but this consonar reads {FORMAT_VERSION}")
    for key, kind in TYPES.items():
        value = metadata.get(key, "missing")
        wrong_size = key in SIZES and (type(value) is not int or value < 1)
        if not isinstance(value, kind) or isinstance(value, bool) or wrong_size:
            raise UserError(f"{path}: {key} is {str(value)[:60]!r}; {REMEDY}")
    if not isinstance(metadata.get("content_sha256"), (str, NoneType)):  # older versions wrote none
        raise UserError(f"{path}: content_sha256 is {str(metadata['content_sha256'])[:60]!r}; {REMEDY}")
    for key in ("items", "labelled", "captioned"):
        if type(metadata["counts"].get(key)) is not int:
            raise UserError(f"{path}: counts.{key} is {str(metadata['counts'].get(key))[:60]!r}; {REMEDY}")
    names, count = metadata["class_names"], metadata["num_classes"]
    if count > MAX_CLASSES:
        raise UserError(f"{path}: num_classes is {count}; at most {MAX_CLASSES}; {REMEDY}")
    if count < 0 or (names is not None and [type(name) for name in names] != [str] * count):
        raise UserError(f"{path}: class_names are not {count} names; {REMEDY}")
    check_distinct(names, str(path))
    return metadata


class ContentHash:
    """SHA-256 of what a store holds, fed in the order of its items: tokens as they lie on disk, labels, captions."""

    def __init__(self) -> None:
        self._tokens, self._told = hashlib.sha256(), hashlib.sha256()

    def update(self, tokens: np.ndarray, labels: Sequence[int | None], captions: Sequence[str | None]) -> None:
        """The next items."""
        self._tokens.update(tokens.tobytes())
        for item in zip(labels, captions, strict=True):
            self._told.update(f"{item}\n".encode(errors="replace"))

    def hexdigest(self) -> str:
        """The hash of all items so far."""
        return hashlib.sha256(self._tokens.digest() + self._told.digest()).hexdigest()

    def check(self, written: str | None, where: str) -> None:
        """`UserError` unless these are the items whose hash was `written`; None: that is not known."""
        if written not in (None, self.hexdigest()):
            raise UserError(f"tokens: {where!r} holds other items than were written: damaged or edited; {REMEDY}")


def check_rows(table: Any, counts: dict[str, int]) -> None:
    """Raises ValueError unless an Arrow table holds what `counts` says and its buffers lie inside the file.

    Reads the names and captions, not the tokens.
    """
    check_buffers(table, "tokens")
    if len(table) != counts["items"]:
        raise ValueError(f"{len(table)} of {counts['items']} items")
    if table.column("tokens").null_count:
        raise ValueError("items without tokens")
    for key, column in (("labelled", "label"), ("captioned", "caption")):
        found = len(table) - table.column(column).null_count
        if found != counts[key]:
            raise ValueError(f"{found} of {counts[key]} items are {key}")


def check_buffers(table: Any, *large: str) -> None:
    """Raises ValueError where columns of an Arrow table point outside their memory; of `large` ones by size alone."""
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            chunk.validate(full=name not in large)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk: uint16 where it holds every token of the vocabulary, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


def check_tokens(tokens: np.ndarray, vocab_size: int, tokenizer_name: str, where: str) -> None:
    """`UserError` for a token outside [0, vocab_size)."""
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < 0 or high >= vocab_size:
        limit = f"tokenizer {tokenizer_name!r} has 0..{vocab_size - 1}: damaged, or made with another tokenizer?"
        raise UserError(f"tokens: {where} holds token {low if low < 0 else high}, but {limit}")


@contextlib.contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn a failure to write the store `path` into a `UserError` that says how much room it needs (bytes) and has."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        room = f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB free; nothing was replaced"
        raise UserError(f"out: cannot write {str(path)!r}: {error.strerror or error}; {room}") from error
