"""Captions as features of a text encoder, or as tokens of the generator's own, kept on the disk.

The captions of a data set are encoded once, each different one, and read from memory-mapped files afterwards. A file
holds `PER_FILE` captions and is named by them and the encoder's fingerprint (without its length where it cut none of
them), so that what is there is used whatever made it, and a job that was ended goes on. Padding is not kept.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError, reading
from consonar.files.readers import read_npy
from consonar.files.writers import cache_dir, keep
from consonar.records import Captions
from consonar.types import PromptCondition, TextCondition, TextEncoder

PER_FILE = 1024
REMEDY = "delete it, it is made again"


class CaptionFeatures:
    """The features of `captions` by `encoder`, in batches of rows; they equal what the encoder gives.

    An item may have several captions: a tuple of them, of which one is read at a time. `folder`: where features are
    kept (`captions` in the cache folder). Where nothing can be kept they stay in memory.
    `progress(done, total)` counts captions. Raises `UserError` as the encoder does, and for a damaged file.
    """

    def __init__(
        self,
        captions: Sequence[str | tuple[str, ...]],
        encoder: TextEncoder,
        *,
        folder: Path | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.width = encoder.width
        items = [(caption,) if isinstance(caption, str) else caption for caption in captions]
        self.counts = np.array([len(item) for item in items], np.int64)
        self.firsts = self.counts.cumsum() - self.counts
        different = sorted({caption for item in items for caption in item})
        written = "\0".join("\n".join(item) for item in items)
        self.content = hashlib.sha256(written.encode(errors="surrogatepass")).hexdigest()
        self.about = f"captions: {len(different):,} different, read by {encoder.name}"
        self.texts = different
        place = {caption: index for index, caption in enumerate(different)}
        self.index = np.array([place[caption] for item in items for caption in item], np.int64)
        folder = cache_dir() / "captions" if folder is None else folder
        self.files: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(different), PER_FILE):
            some = different[start : start + PER_FILE]
            self.files.append(load(folder, some, encoder, batch_size))
            if progress is not None:
                progress(start + len(some), len(different))
        # Of tokens as many as are there, which are all the positions that the generator gives them.
        self.longest = max((int(np.diff(ends, prepend=0).max()) for _, ends in self.files), default=0)
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
            tokens, ends = self.files[index // PER_FILE]
            at = index % PER_FILE
            found = tokens[ends[at - 1] if at else 0 : ends[at]]
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
    captions: Iterable[str | None], where: str, why: str = ", and the generator takes captions"
) -> list[tuple[str, ...]]:
    """The captions of each item, one a line (`in_lines`). `UserError`, which begins with `where` and ends with `why`,
    if one has none with words."""
    whole = ((text or "").encode(errors="replace").decode() for text in captions)  # JSON may hold half a letter
    given = [tuple(line for line in text.split("\n") if line.strip()) for text in whole]
    if missing := given.count(()):
        raise UserError(f"{where}: {missing} of {len(given)} items have no caption{why}")
    return given


def load(folder: Path, captions: Sequence[str], encoder: TextEncoder, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of these captions, (T, F) or (T,), and where each ends (n,); encoded where no file has them."""
    paths = [folder / f"{named(by, captions)}.npy" for by in (encoder.uncut, encoder.fingerprint)]
    for path in paths:
        if not path.exists():  # written last
            continue
        counts = read_npy(path.with_suffix(".counts.npy"))
        with reading(path, "features of captions", REMEDY):
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            inner, kind = of_token(encoder.width)
            if rows.shape != (counts.sum(), *inner) or len(counts) != len(captions) or rows.dtype != kind:
                raise ValueError(f"{rows.dtype} of shape {rows.shape} for {counts.sum()} tokens")
        if counts.max() <= encoder.length:  # else this one cuts what one that reads more did not
            return rows, counts.cumsum()
    parts, masks = [], []
    for start in range(0, len(captions), batch_size):
        found = encoder.encode(captions[start : start + batch_size])
        values = found.features if isinstance(found, TextCondition) else found.tokens
        parts.append(values[found.mask].cpu().numpy())
        masks.append(found.mask.sum(1).cpu().numpy())
    rows, counts = np.concatenate(parts), np.concatenate(masks)
    path = paths[int(counts.max() >= encoder.length)]  # one that fills its places may be cut
    keep(path.with_suffix(".counts.npy"), lambda file: np.save(file, counts))
    keep(path, lambda file: np.save(file, rows))
    return rows, counts.cumsum()


def named(fingerprint: str, captions: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([fingerprint, *captions]).encode()).hexdigest()[:32]
