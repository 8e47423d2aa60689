"""The token store: images as the token indices of one tokenizer, memory-mapped on disk.

A store is a folder with `tokens.arrow`, one row per image (`tokens`: the views one after the other, uint16 or int32;
`label`, `caption`: maybe null; `name`), which `datasets.Dataset.from_file` reads as well, and `store.json`, which names
the tokenizer by its fingerprint. A store appears at its path complete or not at all.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import consonar
from consonar.config_io import to_dict
from consonar.data.labels import LABEL_REMEDY, MAX_CLASSES, check_label, data_line
from consonar.data.store_format import (
    METADATA_FILE,
    REMEDY,
    TOKENS_FILE,
    ContentHash,
    Counts,
    StoreMetadata,
    check_rows,
    check_tokens,
    disk_errors,
    free_room,
    read_metadata,
    token_dtype,
)  # fmt: skip
from consonar.errors import UserError, printable, reading
from consonar.files.lock import folder_at_once, is_taken
from consonar.files.readers import home_expanded
from consonar.origin import Origin, check, of_tokenizer
from consonar.types import Tokenizer

ROWS_PER_BLOCK = 1024
BYTES_PER_NAME = 64  # allowance for an item's name, label and caption when the room on the disk is judged


class StoreWriter:
    """The rows of one store, appended in blocks to `folder`. Made by `new_store`."""

    def __init__(self, path: Path, folder: Path, tokenizer: Tokenizer, num_views: int, num_classes: int | None) -> None:
        from datasets import Features, Value
        from datasets import Sequence as FixedList

        self.path, self.folder, self.tokenizer, self.num_views = path, folder, tokenizer, num_views
        self.num_classes, self.class_limit = num_classes or 0, num_classes
        self.counts = {"items": 0, "labelled": 0, "captioned": 0}
        self.content, self.first, self.left_out, self.enlarged = ContentHash(), "", 0, 0
        tokens = FixedList(Value(token_dtype(tokenizer.vocab_size).name), length=num_views * tokenizer.num_tokens)
        features = Features(tokens=tokens, label=Value("int64"), caption=Value("string"), name=Value("string"))
        self.schema = features.arrow_schema
        self.file = pa.OSFile(str(folder / TOKENS_FILE), "wb")
        self.arrow = pa.ipc.new_stream(self.file, self.schema)
        self.pending: list[pa.Table] = []

    def write(
        self, tokens: np.ndarray, labels: Sequence[int | None], captions: Sequence[str | None], names: Sequence[str]
    ) -> None:
        """Append b items: tokens (b, views, N), any integer type. `UserError` for a token or label out of range."""
        if not names:
            return
        shape = (len(names), self.num_views, self.tokenizer.num_tokens)
        assert tokens.shape == shape, f"tokens {tokens.shape}, expected {shape}"
        check_tokens(tokens, self.tokenizer.vocab_size, self.tokenizer.name, f"{names[0]}..{names[-1]}")
        limit = MAX_CLASSES if self.class_limit is None else self.class_limit
        labels = [
            None if label is None else int(check_label(label, limit, name))  # a NumPy integer is written otherwise
            for label, name in zip(labels, names, strict=True)
        ]
        known = [label for label in labels if label is not None]
        self.num_classes = max([self.num_classes, *(label + 1 for label in known)])
        self.counts["items"] += len(names)
        self.counts["labelled"] += len(known)
        self.counts["captioned"] += sum(caption is not None for caption in captions)
        self.first = self.first or names[0]
        if self.counts["labelled"] < self.counts["items"] and (self.class_limit or self.counts["labelled"]):
            bare = names[labels.index(None)] if None in labels else self.first
            raise UserError(f"{bare}: no label, though the data have classes; {LABEL_REMEDY}")
        flat = tokens.astype(token_dtype(self.tokenizer.vocab_size)).ravel()
        self.content.update(flat, labels, captions)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), tokens[0].size)
        columns = {"tokens": rows, "label": labels, "caption": captions, "name": list(map(printable, names))}
        self.pending.append(pa.Table.from_pydict(columns, schema=self.schema))
        if sum(map(len, self.pending)) >= ROWS_PER_BLOCK:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            rows = pa.concat_tables(self.pending).combine_chunks()
            with disk_errors(self.path, self.counts["items"] * rows.nbytes // len(rows)):
                self.arrow.write_table(rows)  # as one block, for fast opening
            self.pending.clear()


def check_free(path: Path, items: int, tokenizer: Tokenizer, num_views: int) -> int:
    """The bytes of an item. `UserError` where `path` is taken, or the disk has too little room for so many items."""
    if is_taken(path):
        raise UserError(f"out: {str(path)!r} exists and is not replaced; choose another path or remove it")
    size = num_views * tokenizer.num_tokens * token_dtype(tokenizer.vocab_size).itemsize + BYTES_PER_NAME
    with disk_errors(path, items * size):
        if items * size > free_room(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return size


@contextlib.contextmanager
def new_store(
    path: str | Path,
    tokenizer: Tokenizer,
    num_views: int,
    class_names: tuple[str, ...] | None,
    *,
    views: str,
    source: str,
    source_sha256: str | None = None,
    precision: str | None = None,
    imported_from: str | None = None,
    may_be_empty: bool = False,
) -> Iterator[StoreWriter]:
    """A writer whose rows are the store at `path` once the `with` block has ended without an exception.

    `views`, `source`, `source_sha256`, `precision` and, of converted data, `imported_from` go into the metadata. All is
    written to a hidden folder beside `path`, renamed at the end, removed on any exception or interrupt (what a killed
    process left: at the next call). Raises `UserError` when `path` exists, when another process writes it, when the
    disk runs full, and when nothing was written, unless it `may_be_empty`.
    """
    path = home_expanded(path)
    bytes_per_item = check_free(path, 0, tokenizer, num_views)
    with contextlib.ExitStack() as undo:
        with disk_errors(path, 0):
            partial = undo.enter_context(folder_at_once(path))
            writer = StoreWriter(path, partial, tokenizer, num_views, None if class_names is None else len(class_names))
        undo.callback(writer.file.close)
        yield writer
        if writer.counts["items"] == 0 and not may_be_empty:
            raise UserError(f"data: {source} holds no items")
        writer.flush()
        metadata = StoreMetadata(
            consonar_version=consonar.__version__, tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint,
            content_sha256=writer.content.hexdigest(), views=views, source=source, source_sha256=source_sha256,
            precision=precision, imported_from=imported_from, vocab_size=tokenizer.vocab_size,
            num_tokens=tokenizer.num_tokens, num_views=num_views, counts=Counts(**writer.counts),
            num_classes=writer.num_classes, class_names=class_names, left_out=writer.left_out,
            enlarged=writer.enlarged,
        )  # fmt: skip
        with disk_errors(path, writer.counts["items"] * bytes_per_item):
            writer.arrow.close()
            (partial / METADATA_FILE).write_text(json.dumps(to_dict(metadata), indent=1))


class TokenStore:
    """A token store on disk, memory-mapped: opening reads no tokens, reading touches only the rows asked for."""

    def __init__(self, path: Path, metadata: StoreMetadata, buffer: pa.Buffer) -> None:
        self.path, self.name = path, path.name
        self.tokenizer_name, self.fingerprint, self.source = metadata.tokenizer, metadata.fingerprint, metadata.source
        self.vocab_size, self.num_tokens, self.num_views = metadata.vocab_size, metadata.num_tokens, metadata.num_views
        self.num_classes, self.class_names = metadata.num_classes, metadata.class_names
        self.metadata, self.table = metadata, pa.ipc.open_stream(buffer).read_all()
        check_rows(self.table, metadata.counts)
        column, dtype = self.table.column("tokens"), token_dtype(self.vocab_size)
        if column.type != pa.list_(pa.from_numpy_dtype(dtype), self.num_views * self.num_tokens):
            raise ValueError(f"tokens have the type {column.type}, which is not what {METADATA_FILE} says")
        self._flat = np.frombuffer(buffer, dtype, count=buffer.size // dtype.itemsize)
        # Arrow keeps the rows in blocks. The place of every block in the file makes one gather of any set of rows.
        starts, self._row_size = [], self.num_views * self.num_tokens
        for chunk in column.chunks:
            values = chunk.flatten()
            starts.append((values.buffers()[1].address - buffer.address) // dtype.itemsize + values.offset)
        self._block_starts = np.array(starts, dtype=np.int64)
        self._first_rows = np.cumsum([0, *map(len, column.chunks)])  # of every block, then the number of all

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """The store at `path`; `UserError` when there is none, it is damaged, or it has another format version."""
        path = home_expanded(path)
        metadata = read_metadata(path)
        with reading(f"tokens: {str(path)!r}", "a token store", REMEDY):
            return cls(path, metadata, pa.memory_map(str(path / TOKENS_FILE)).read_buffer())

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def read(self, rows: Tensor, views: Tensor) -> Tensor:
        """Tokens (B, N) of view `views` (B,) of items `rows` (B,), all int64; `UserError` for one out of range."""
        items, crops = rows.numpy(), views.numpy()
        for index, limit in ((items, len(self)), (crops, self.num_views)):
            if index.size and (index.min() < 0 or index.max() >= limit):
                raise IndexError(f"{index.min()}..{index.max()} of {limit} rows or views in {self.path}")
        blocks = np.searchsorted(self._first_rows, items, side="right") - 1
        in_block = (items - self._first_rows[blocks]) * self._row_size
        starts = self._block_starts[blocks] + in_block + crops * self.num_tokens  # (B,)
        tokens = self._flat[starts[:, None] + np.arange(self.num_tokens)]  # (B, N)
        check_tokens(tokens, self.vocab_size, self.tokenizer_name, str(self.path))
        return torch.from_numpy(tokens.astype(np.int64))

    @cached_property
    def labels(self) -> Tensor:
        """(len,) int64 class labels; `UserError` when some or all items have none, or one that is no class."""
        if (labelled := self.metadata.counts.labelled) < len(self):
            found = f"{labelled} of {len(self)} items in {str(self.path)!r} have a class label"
            raise UserError(f"tokens: {found}; tokenize again: {LABEL_REMEDY}")
        labels = torch.from_numpy(self.table.column("label").to_numpy().astype(np.int64))
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(f"tokens: {str(self.path)!r} has a label outside its {self.num_classes} classes; damaged?")
        return labels

    @property
    def captions(self) -> list[str | None]:
        """Of all items; None for one without."""
        found: list[str | None] = self.table.column("caption").to_pylist()
        return found

    @property
    def origin(self) -> Origin:
        """What the tokens were made of and with; without a hash of the content where an older version wrote them."""
        return Origin(
            tokenizer=self.tokenizer_name, tokenizer_fingerprint=self.fingerprint, class_names=self.class_names,
            data=self.source, data_sha256=self.metadata.content_sha256, pictures_sha256=self.metadata.source_sha256,
        )  # fmt: skip

    def describe(self) -> str:
        counted = self.table.column("label").value_counts().to_pylist()
        return data_line({row["values"]: row["counts"] for row in counted}, self.class_names)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """`UserError` unless the store was made by exactly this tokenizer (same configuration and weights)."""
        given = of_tokenizer(tokenizer)
        check(f"tokens: {str(self.path)!r}", self.origin, given, "this run", "tokenize again or use that tokenizer")
        for key in ("num_tokens", "vocab_size"):
            if (found := getattr(self, key)) != (expected := getattr(tokenizer, key)):
                raise UserError(f"tokens: {str(self.path)!r}: {key} is {found}, of its tokenizer {expected}; {REMEDY}")

    def check_content(self) -> None:
        """Read everything once; `UserError` for a token outside [0, vocab_size) and a hash that was not written."""
        found, where = ContentHash(), str(self.path)
        for batch in self.table.to_batches():
            tokens = batch.column("tokens").flatten().to_numpy()
            check_tokens(tokens, self.vocab_size, self.tokenizer_name, where)
            found.update(tokens, batch.column("label").to_pylist(), batch.column("caption").to_pylist())
        if self.metadata.content_sha256 not in (None, found.hexdigest()):
            raise UserError(f"tokens: {where!r} holds other items than were written: damaged or edited; {REMEDY}")
