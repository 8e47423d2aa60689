"""Captions as features of a text encoder, or as tokens of the generator's own, kept on the disk.

Every different caption is encoded once and read from memory-mapped files afterwards. An encoder has a folder, named by
its fingerprint (without its length, for captions that it has read whole), to which files of up to `PER_FILE` captions
are added by one process at a time, and in which none changes. An index beside each has the hash of every caption and
how many tokens it has: none where the encoder finds no words. So what is there is used whatever made it, and a job that
was ended goes on. Padding is not kept.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError, reading
from consonar.files.lock import making
from consonar.files.readers import read_npy
from consonar.files.writers import cache_dir, keep
from consonar.records import Captions
from consonar.types import PromptCondition, TextCondition, TextEncoder

PER_FILE = 1024
INDEX = ".index.npy"
REMEDY = "delete it, it is made again"
Called = Callable[[int], str]
"""In words which item a number of 0 or more means."""
NUMBERED: Called = "number {:,}, counted from 0".format


class EncodedTexts:
    """The tokens of different `texts` by an encoder: those that `folder` has, and the others encoded and kept there, or
    in memory where nothing can be kept. `progress(done, total)` counts texts. Raises as `CaptionFeatures`."""

    def __init__(
        self,
        texts: Sequence[str],
        encoder: TextEncoder,
        folder: Path,
        batch_size: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.width, self.length = encoder.width, encoder.length  # the encoder itself is large, and needed here alone
        self.sizes = np.zeros(len(texts), np.int64)
        """Of every text the number of its tokens."""
        self.places = np.full((len(texts), 2), -1)
        """Which of `files` has it, and which of the texts there it is."""
        self.files: list[tuple[np.ndarray, np.ndarray]] = []
        """The tokens of some texts, (T, F) or (T,), and where each ends (n,)."""
        self.wanted = {hash_of(text): index for index, text in enumerate(texts)}
        self.folders = [folder / named(by.encode()) for by in (encoder.uncut, encoder.fingerprint)]
        self.looked_in = set[Path]()
        self.look()

        def follow() -> bool:  # its holder may be at other captions for hours yet, and others wait for this process
            self.look()
            progress(done := int((self.places[:, 0] >= 0).sum()), len(texts))
            return done == len(texts)

        if (self.places[:, 0] < 0).any():
            with making(self.folders[0], meanwhile=follow) as beat:
                self.look()  # another process may have made them meanwhile
                for done in self.encode_missing(texts, encoder, batch_size):
                    beat()
                    progress(done, len(texts))

    def look(self) -> None:
        """Takes what is wanted from all files that have come since the last look."""
        for path in [path for place in self.folders for path in sorted(place.glob(f"*{INDEX}"))]:
            if path not in self.looked_in:
                self.look_in(path)

    def encode_missing(self, texts: Sequence[str], encoder: TextEncoder, batch_size: int) -> Iterator[int]:
        """Encodes and keeps what is not there; gives after each batch how many texts are done."""
        whole, own = self.folders
        missing = np.flatnonzero(self.places[:, 0] < 0).tolist()
        for start in range(0, len(missing), PER_FILE):
            some, rows = [texts[index] for index in missing[start : start + PER_FILE]], list[np.ndarray]()
            for first in range(0, len(some), batch_size):
                found = encoder.encode(some[first : first + batch_size])
                values = found.features if isinstance(found, TextCondition) else found.tokens
                rows += [row[shown].cpu().numpy() for row, shown in zip(values, found.mask, strict=True)]
                yield len(texts) - len(missing) + start + len(rows)
            full = [len(row) >= encoder.length for row in rows]  # one that fills its places may be cut
            for place, cut in ((whole, False), (own, True)):
                if part := [(text, row) for text, row, maybe in zip(some, rows, full, strict=True) if maybe == cut]:
                    self.keep(place, *zip(*part, strict=True))

    def of(self, index: int) -> np.ndarray:
        """The tokens of a text."""
        file, at = self.places[index]
        tokens, ends = self.files[file]
        return tokens[ends[at - 1] if at else 0 : ends[at]]

    def keep(self, place: Path, texts: Sequence[str], rows: Sequence[np.ndarray]) -> None:
        hashes = b"".join(map(hash_of, texts))
        index = np.column_stack([np.frombuffer(hashes, "<u8").reshape(-1, 2), np.array(list(map(len, rows)), "<u8")])
        path, tokens = place / f"{named(hashes)}{INDEX}", np.concatenate(rows)
        keep(tokens_beside(path), partial(write_array, tokens))
        if tokens_beside(path).exists():
            keep(path, partial(write_array, index))
        if tokens_beside(path).exists() and path.exists():
            self.look_in(path)
        else:
            self.take(index, lambda: tokens)

    def look_in(self, path: Path) -> None:
        """Takes what is wanted from the file of this index, where it is there."""
        if not (beside := tokens_beside(path)).exists():
            return
        self.looked_in.add(path)
        with reading(path, "an index of captions", REMEDY):
            index = read_npy(path, REMEDY)
            if index.ndim != 2 or index.shape[1] != 3 or index.dtype != "<u8":
                raise ValueError(f"{index.dtype} of shape {index.shape}")

        def tokens() -> np.ndarray:
            with reading(beside, "features of captions", REMEDY):
                rows: np.ndarray = np.load(beside, mmap_mode="r", allow_pickle=False)
                inner, kind = of_token(self.width)
                if rows.shape != (index[:, 2].sum(), *inner) or rows.dtype != kind:
                    raise ValueError(f"{rows.dtype} of shape {rows.shape} for {index[:, 2].sum()} tokens")
            return rows

        self.take(index, tokens)

    def take(self, index: np.ndarray, tokens: Callable[[], np.ndarray]) -> None:
        """Takes the texts that are not there yet, but those that this encoder cuts where another did not."""
        hashes = np.ascontiguousarray(index[:, :2]).view("V16")[:, 0].tolist()
        found = [
            (self.wanted[one], at)
            for at, (one, size) in enumerate(zip(hashes, index[:, 2].tolist(), strict=True))
            if one in self.wanted and size <= self.length and self.places[self.wanted[one], 0] < 0
        ]
        if found:
            texts, ats = map(list, zip(*found, strict=True))
            self.places[texts, 0], self.places[texts, 1], self.sizes[texts] = len(self.files), ats, index[ats, 2]
            self.files.append((tokens(), index[:, 2].cumsum().astype(np.int64)))


class CaptionFeatures:
    """The features of `captions` by `encoder`, in batches of rows; they equal what the encoder gives.

    An item may have several captions: a tuple of them, of which one is read at a time; those in which the encoder finds
    no words are left out, which `about` counts, as it does those that are cut. `folder`: where features are kept
    (`captions` in the cache folder).
    `progress(done, total)` counts captions. Raises `UserError`, which begins with `where`, for an item that has no
    words, which is `called` so, and for a damaged file.
    """

    def __init__(
        self,
        captions: Sequence[str | tuple[str, ...]],
        encoder: TextEncoder,
        *,
        folder: Path | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
        where: str = "caption",
        called: Called = NUMBERED,
    ) -> None:
        self.width = encoder.width
        items = [(caption,) if isinstance(caption, str) else caption for caption in captions]
        written = "\0".join("\n".join(item) for item in items)
        self.content = hashlib.sha256(written.encode(errors="surrogatepass")).hexdigest()
        self.texts = sorted({caption for item in items for caption in item})
        folder = cache_dir() / "captions" if folder is None else folder
        self.encoded = EncodedTexts(self.texts, encoder, folder, batch_size, progress)
        place = {text: index for index, text in enumerate(self.texts) if self.encoded.sizes[index]}
        worded = [[place[caption] for caption in item if caption in place] for item in items]
        if [] in worded:
            first, more = worded.index([]), worded.count([]) - 1
            number = f" ({called(first)}{f'; {more:,} more have none' if more else ''})"
            text = items[first][0][:60]
            raise UserError(f"{where}: {text!r}{number if len(items) > 1 else ''} has no words for {encoder.name}")
        self.about = f"captions: {len(self.texts):,} different, read by {encoder.name}"
        if left := len(self.texts) - len(place):
            self.about += f"; {left:,} in which it finds no words are left out"
        full = np.flatnonzero(self.encoded.sizes >= encoder.length).tolist()  # no other can have been cut
        self.num_cut = sum(encoder.is_cut(self.texts[index]) for index in full)
        if self.num_cut:
            self.about += f"; {self.num_cut:,} cut after {encoder.length} tokens"
        self.counts = np.array(list(map(len, worded)), np.int64)
        self.firsts = self.counts.cumsum() - self.counts
        self.index = np.array([index for item in worded for index in item], np.int64)
        # Of tokens as many as are there, which are all the positions that the generator gives them.
        self.longest = int(self.encoded.sizes.max(initial=0))
        self.length = encoder.length if self.width else self.longest

    def __len__(self) -> int:
        return len(self.counts)

    def spread(self, count: int) -> Tensor:
        """So many items at equal steps; of fewer items all in turn."""
        rows = torch.arange(count)
        return rows * len(self) // count if count <= len(self) else rows % len(self)

    def chosen(self, rows: Tensor, draws: Tensor | None = None) -> np.ndarray:
        """Which of the different captions is that of each item of `rows` (B,): the one that numbers `draws` (B,), 0 or
        more, choose of several; None: the first."""
        items = rows.numpy()
        nth = 0 if draws is None else draws.numpy() % self.counts[items]
        places: np.ndarray = self.index[self.firsts[items] + nth]
        return places

    def words(self, rows: Tensor, draws: Tensor | None = None) -> Captions:
        """The captions themselves (`chosen`)."""
        return Captions(self.texts, torch.from_numpy(self.chosen(rows, draws)))

    def read(self, rows: Tensor, draws: Tensor | None = None) -> TextCondition | PromptCondition:
        """Their features (B, L, F), or tokens (B, length of the longest caption of all), and mask."""
        mask = np.zeros((len(rows), self.length), bool)
        values = np.zeros((*mask.shape, *of_token(self.width)[0]), of_token(self.width)[1])
        for row, index in enumerate(self.chosen(rows, draws).tolist()):
            found = self.encoded.of(index)
            values[row, self.length - len(found) :] = found
            mask[row, self.length - len(found) :] = True
        given = torch.from_numpy(values), torch.from_numpy(mask)
        return TextCondition(*given) if self.width else PromptCondition(*given)


def of_token(width: int) -> tuple[tuple[int, ...], type[np.generic]]:
    """Shape and type of what stands for a token: its features, or its number in a vocabulary."""
    return ((width,), np.float32) if width else ((), np.int64)


def in_lines(captions: Iterable[str]) -> str:
    """Several captions of one picture as its one text, a line each."""
    return "\n".join(" ".join(caption.split("\n")) for caption in captions)


def all_captions(
    captions: Iterable[str | None],
    where: str,
    why: str = ", and the generator takes captions",
    has_words: Callable[[str], object] = str.strip,
    called: Called = NUMBERED,
) -> list[tuple[str, ...]]:
    """The captions of each item, one a line (`in_lines`). `UserError`, which begins with `where` and ends with `why`,
    if one, which is `called` so, has none with words."""
    whole = [(text or "").encode(errors="replace").decode() for text in captions]  # JSON may hold half a letter
    given = [tuple(line for line in text.split("\n") if has_words(line)) for text in whole]
    if missing := given.count(()):
        first = f"{called(row := given.index(()))}, {whole[row][:60]!r}"
        raise UserError(f"{where}: {missing} of {len(given)} items have no caption (the first: {first}){why}")
    return given


def write_array(array: np.ndarray, file: IO[bytes]) -> None:
    """As `np.save`, which does not tell when there is no room for the last bytes."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def named(content: bytes) -> str:
    """A name for a file or folder of this content."""
    return hashlib.sha256(content).hexdigest()[:32]


def tokens_beside(index: Path) -> Path:
    return index.with_name(index.name.replace(INDEX, ".npy"))
