"""Copy rate: how many samples are nearer to a training image than held-out images ever are.

A Fréchet distance to a small training set rewards memorising it, so the rate is reported beside it. Definition of this
project; related: the nearest-neighbour tests of Meehan et al. 2020 (arXiv 2004.05675).

Let d(x) be the distance of an image to its nearest training image, over all stored views (crops, flips) of that image.
The threshold is the smallest d over the validation images; a sample is a copy when d(sample) is strictly below it. One
validation image that is nearly a training image makes it about 0, and hardly any sample can count: `quantile` takes
that quantile of the validation distances instead; at q a share of q of the validation images would be copies too.

Shapes: `S` samples, `T` training images, `K` validation images, `F` features, `N` tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consonar.errors import UserError
from consonar.float32 import in_float32

ROUNDING = 8
"""Units of rounding of a cosine: of two normalisations and of a sum of products, taken twice."""
BLOCK = 1024
"""Rows that are compared with as many others at a time: what memory that takes."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""(L, R) distances of the rows of (L, F or N) and (R, F or N)."""


@dataclass(frozen=True)
class CopyRate:
    """Which samples are copies."""

    threshold: float
    """Distances below it count."""
    quantile: float
    """Which quantile of the validation distances the threshold is; 0 is the minimum."""
    is_copy: Tensor
    """(S,) bool."""
    distances: Tensor
    """(S,) float64: distance of each sample to its nearest training image."""
    indices: Tensor
    """(S,) int64: row of that training image."""
    rows: Tensor
    """(S,) int64: which samples these are, where some were drawn from more."""
    held_out: Tensor
    """(K,) float64: distance of each validation image to its nearest training image, whatever the samples are."""


def copy_rate_tokens(
    samples: Tensor, train: Tensor, validation: Tensor, *, quantile: float = 0.0, held_out: Tensor | None = None
) -> CopyRate:
    """Copy rate by Hamming distance of tokens: how many of N differ.

    `samples` (S, N), `train` (T, N) or (T, views, N), `validation` (K, N) or (K, views, N), integers that are not
    negative. `held_out`: that of a `CopyRate` against the same two sets, where the caller has one. Raises UserError as
    `check_sets` does.
    """
    check_sets(samples, train, validation, quantile, "tokens", "tokens per image (same tokenizer?)")
    # All three in the smallest integer type that holds them: the comparison is bound by memory traffic.
    largest = max(int(tokens.max()) for tokens in (samples, train, validation))
    dtype = torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32
    samples, train, validation = samples.to(dtype), train.to(dtype), validation.to(dtype)
    return _copy_rate(samples, train, validation, hamming_distances, quantile, held_out)


def copy_rate_features(
    samples: Tensor, train: Tensor, validation: Tensor, *, quantile: float = 0.0, held_out: Tensor | None = None
) -> CopyRate:
    """Copy rate by cosine distance of features, 1 - cosine similarity: 0 to 2.

    `samples` (S, F), `train` (T, F) or (T, views, F), `validation` (K, F) or (K, views, F), float32 or float64.
    `held_out` as of `copy_rate_tokens`. Raises UserError as `check_sets` does, and for a vector of length 0.
    """
    check_sets(samples, train, validation, quantile, "features", "features (same feature network?)")
    return _copy_rate(_unit(samples), _unit(train), _unit(validation), _cosine_distances, quantile, held_out)


def check_sets(samples: Tensor, train: Tensor, validation: Tensor, quantile: float, what: str, number: str) -> None:
    """Raises `UserError` for sets without images or of different vectors, and for what is no quantile."""
    if not 0 <= quantile <= 1:
        raise UserError(f"copy_quantile: {quantile}; choose a number from 0 (the minimum) to 1")
    if samples.ndim != 2 or any(vectors.shape[-1] != samples.shape[1] for vectors in (train, validation)):
        shapes = ", ".join(str(tuple(vectors.shape)) for vectors in (samples, train, validation))
        sets = f"{what} of shape {shapes} for samples, train and validation"
        raise UserError(f"copy rate: {sets}; all need the same number of {number}")
    if min(len(samples), len(train), len(validation)) == 0:
        counts = f"{len(samples)} samples, {len(train)} training and {len(validation)} validation images"
        raise UserError(f"copy rate: {counts}; it needs at least one of each")


@in_float32
def hamming_distances(left: Tensor, right: Tensor) -> Tensor:
    """(L, R) int16 number of positions in which the rows of (L, N) and (R, N) differ; N < 32,768."""
    shape = (len(left), len(right))
    distances, differs = np.zeros(shape, np.int16), np.empty(shape, bool)
    columns = zip(left.T.numpy(), np.ascontiguousarray(right.T.numpy()), strict=True)
    # One position at a time, counted in bytes: an (L, R, N) block would be N times larger and far slower to sum, and
    # numpy compares and adds bytes several times faster here than torch does.
    while group := list(itertools.islice(columns, 255)):
        counts = np.zeros(shape, np.uint8)
        for left_tokens, right_tokens in group:
            np.not_equal(left_tokens[:, None], right_tokens[None, :], out=differs)
            counts += differs.view(np.uint8)
        distances += counts
    return torch.from_numpy(distances)


@in_float32
def _cosine_distances(left: Tensor, right: Tensor) -> Tensor:
    distances = 1 - left @ right.T
    # Equal vectors are at distance 0, whatever the rounding of their products: none is nearer than another.
    return distances.masked_fill_(distances < ROUNDING * torch.finfo(distances.dtype).eps, 0)


def _unit(features: Tensor) -> Tensor:
    lengths = features.norm(dim=-1, keepdim=True)
    if not (lengths > 0).all():
        raise UserError("copy rate: a feature vector has length 0 or is not a number, its cosine is not defined")
    return features / lengths


def _nearest(queries: Tensor, rows: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Distance (Q,) of every query to its nearest row, and the index (Q,) of that row (the first one when equal)."""
    distances, indices = [], []
    for queries_block in queries.split(BLOCK):
        best = torch.full((len(queries_block),), torch.inf, dtype=torch.float64)
        index = torch.zeros(len(queries_block), dtype=torch.int64)
        for start in range(0, len(rows), BLOCK):
            nearest = distance(queries_block, rows[start : start + BLOCK]).min(1)
            nearer = nearest.values < best
            best = torch.where(nearer, nearest.values.to(best.dtype), best)
            index = torch.where(nearer, nearest.indices + start, index)
        distances.append(best)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def _copy_rate(
    samples: Tensor, train: Tensor, validation: Tensor, distance: Distance, quantile: float, held_out: Tensor | None
) -> CopyRate:
    num_views = train.shape[1] if train.ndim == 3 else 1
    train_rows = train.reshape(-1, train.shape[-1])  # (T * views, F or N)
    if held_out is None:
        of_views, _ = _nearest(validation.reshape(-1, validation.shape[-1]), train_rows, distance)
        held_out = of_views.reshape(len(validation), -1).amin(1)  # the nearest view of an image counts
    threshold = float(held_out.quantile(quantile, interpolation="lower"))
    distances, indices = _nearest(samples, train_rows, distance)
    return CopyRate(
        threshold=threshold,
        quantile=quantile,
        is_copy=distances < threshold,
        distances=distances,
        indices=indices // num_views,
        rows=torch.arange(len(samples)),
        held_out=held_out,
    )
