"""Token files that other projects write, converted to a token store.

* RAR and reAR: one JSON line per crop, {"class_id": int, "tokens": [int, ...]} (pre-tokenised ImageNet).
* LlamaGen: one `<i>.npy` of codes (1, crops, N) and one of labels (1,) per image, in two folders.

The files do not say which tokenizer made them: the user does, and the store carries that tokenizer's fingerprint.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from consonar.data.labels import MAX_CLASSES
from consonar.data.store_format import check_tokens
from consonar.data.tokens import TokenStore, new_store
from consonar.errors import UserError, reading
from consonar.files.readers import entry_of, home_expanded, parse_json, read_npy
from consonar.types import Tokenizer

ITEMS_PER_WRITE = 1024
Item = tuple[np.ndarray, int, str]
"""Tokens (views, N), label and name of one item."""


def _check_item(tokens: np.ndarray, label: object, tokenizer: Tokenizer, where: str) -> None:
    """`UserError` unless tokens (views, N) and label suit the tokenizer; `where` is the file, with the line if any."""
    if tokens.dtype.kind not in "iu":
        raise UserError(f"{where}: tokens of type {tokens.dtype}; they must be integers")
    if tokens.ndim != 2 or tokens.shape[1] != tokenizer.num_tokens or len(tokens) == 0:
        expected = f"{tokenizer.name!r} has {tokenizer.num_tokens} a crop"
        raise UserError(f"{where}: tokens of shape {tokens.shape}; {expected}")
    check_tokens(tokens, tokenizer.vocab_size, tokenizer.name, where)
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where}: class {label!r}; it must be an integer from 0 to {MAX_CLASSES - 1}")


def _write(
    items: Iterator[Item], out: str | Path, tokenizer: Tokenizer, num_views: int, kind: str, source: Path
) -> TokenStore:
    store = new_store(out, tokenizer, num_views, None, views="imported", source=str(source), imported_from=kind)
    with store as writer:
        while block := list(islice(items, ITEMS_PER_WRITE)):
            tokens, labels, names = zip(*block, strict=True)
            writer.write(np.stack(tokens), labels, [None] * len(block), names)
    return TokenStore.open(out)


def _rar_items(jsonl: Path, tokenizer: Tokenizer) -> Iterator[Item]:
    with jsonl.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{jsonl}:{number}"
            if not line.strip():
                continue
            with reading(where, 'a line of the form {"class_id": int, "tokens": [int, ...]}'):
                entry = parse_json(line)
                label, tokens = entry_of(entry, "class_id", where), np.asarray(entry_of(entry, "tokens", where))
            _check_item(tokens[None], label, tokenizer, where)
            yield tokens[None], label, f"{jsonl.name}:{number}"


def import_rar_jsonl(jsonl: str | Path, out: str | Path, tokenizer: Tokenizer) -> TokenStore:
    """Convert RAR's pre-tokenised file: every line becomes an item with one view; blank lines are skipped.

    Several crops of an image are separate lines there and stay separate items. Raises `UserError`, with the line of one
    that has another form, a token outside the vocabulary or a negative class; otherwise as `new_store` does.
    """
    jsonl = home_expanded(jsonl)
    if not jsonl.is_file():
        raise UserError(f"--data: no file {str(jsonl)!r}")
    return _write(_rar_items(jsonl, tokenizer), out, tokenizer, 1, "rar jsonl", jsonl)


def _numbered_files(folder: Path, what: str) -> list[Path]:
    """0.npy, 1.npy, ... in `folder`, without a gap."""
    if not folder.is_dir():
        raise UserError(f"{what}: no folder {str(folder)!r}")
    found = {path.name for path in folder.glob("*.npy")}
    expected = [f"{index}.npy" for index in range(len(found))]
    if not found:
        raise UserError(f"{what}: no .npy file in {str(folder)!r}; looked for 0.npy, 1.npy, ...")
    if missing := [name for name in expected if name not in found]:
        though = f"though {min(found - set(expected))} is there; number from 0 on"
        raise UserError(f"{what}: {missing[0]} is missing in {str(folder)!r}, {though}")
    return [folder / name for name in expected]


def _llamagen_items(codes: list[Path], labels: list[Path], tokenizer: Tokenizer) -> Iterator[Item]:
    num_views = 0
    for code_file, label_file in zip(codes, labels, strict=True):
        tokens, label = read_npy(code_file), read_npy(label_file)
        tokens = tokens[0] if tokens.ndim == 3 and len(tokens) == 1 else tokens
        if label.shape != (1,) or label.dtype.kind not in "iu":
            raise UserError(f"{label_file}: {label.dtype} of shape {label.shape}; a label is one integer, shape (1,)")
        _check_item(tokens, int(label[0]), tokenizer, str(code_file))
        num_views = num_views or len(tokens)
        if len(tokens) != num_views:
            others = f"{codes[0].name} has {num_views}; all must have the same"
            raise UserError(f"{code_file}: {len(tokens)} crops, but {others}")
        yield tokens, int(label[0]), code_file.stem


def import_llamagen_npy(
    codes_dir: str | Path, labels_dir: str | Path, out: str | Path, tokenizer: Tokenizer
) -> TokenStore:
    """Convert LlamaGen's extracted codes: every numbered file becomes an item whose views are the file's crops.

    `codes_dir` holds 0.npy, 1.npy, ... of shape (1, crops, N), (crops, N) or (1, N), `labels_dir` as many of (1,).
    Raises `UserError` with the file for a missing or unreadable one, another shape or number of crops, a token outside
    the vocabulary and a negative class; otherwise as `new_store` does.
    """
    codes_dir = home_expanded(codes_dir)
    codes = _numbered_files(codes_dir, "--data")
    labels = _numbered_files(home_expanded(labels_dir), "--labels")
    if len(codes) != len(labels):
        raise UserError(f"--labels: {len(labels)} label files for {len(codes)} code files")
    items = _llamagen_items(codes, labels, tokenizer)
    first = next(items)
    return _write(chain([first], items), out, tokenizer, len(first[0]), "llamagen npy", codes_dir)
