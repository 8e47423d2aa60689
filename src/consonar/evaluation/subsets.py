"""A random subset of a stream of pictures that no order of the stream changes.

Metrics that compare pictures with pictures read at most so many of a set. The first ones would be the first classes of
a set that is sorted, so the subset is drawn over all of it: every picture gets a number from its pixels and the seed,
and the smallest numbers stay ("bottom-k sampling"). Neither the length of the stream need be known, nor does its order
matter.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter

import numpy as np
import torch
from torch import Tensor


class RowDraw:
    """Keeps the feature vectors of `max_rows` pictures of a stream, drawn with `seed`; of a shorter stream all.

    Pictures that are equal are told apart by how many of them came before: which of them is kept makes no difference.
    Beside the kept vectors it holds some 100 bytes for each picture that it has seen.
    """

    def __init__(self, max_rows: int, seed: int) -> None:
        self.max_rows, self.seed, self.count = max_rows, seed.to_bytes(8, "big", signed=True), 0
        self.seen: Counter[bytes] = Counter()
        self.kept: list[tuple[int, int, Tensor]] = []
        """A heap of (number less than 0, row in the stream, vector (F,)): the first one has the largest number."""

    def update(self, images: np.ndarray, vectors: Tensor) -> None:
        """Adds pictures, uint8 (B, H, W, 3), and their features (B, F)."""
        for image, vector in zip(images, vectors, strict=True):
            content = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
            copy = self.seen[content].to_bytes(8, "big")
            self.seen[content] += 1
            number = int.from_bytes(hashlib.blake2b(content + copy, digest_size=8, key=self.seed).digest(), "big")
            if len(self.kept) < self.max_rows:
                heapq.heappush(self.kept, (-number, self.count, vector.clone()))
            elif -number > self.kept[0][0]:
                heapq.heapreplace(self.kept, (-number, self.count, vector.clone()))
            self.count += 1

    def result(self, num_features: int) -> tuple[Tensor, Tensor]:
        """The vectors (R, F) float32 and their rows in the stream (R,) int64, rising."""
        kept = sorted(self.kept, key=lambda entry: entry[1])
        rows = torch.tensor([row for _, row, _ in kept], dtype=torch.int64)
        return (torch.stack([vector for *_, vector in kept]) if kept else torch.zeros(0, num_features)), rows
