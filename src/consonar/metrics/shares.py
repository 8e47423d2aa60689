"""Shares of what is right and wrong, with their intervals. Pure functions."""

from collections.abc import Mapping, Sequence

import numpy as np

Interval = tuple[float, float]
Z = 1.96
"""Standard deviations to either side that hold 95 % of a normal distribution."""
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
DIVISIONS, DEVIATIONS, NOTABLE, RARE = 200, 5, 0.05, 1e-4


def t_95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom; with more than 30 that of 30."""
    return T_95[min(degrees, len(T_95)) - 1]


def wilson(share: float, count: float) -> Interval:
    """The interval of 95 % of a share of `count` independent trials (Wilson 1927), inside 0 and 1; never of width 0.

    For a mean of `count` numbers between 0 and 1 it is too wide, never too narrow: theirs vary less than 0 and 1 do.
    """
    middle, widened = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    return max(0.0, (middle - half) / widened), min(1.0, (middle + half) / widened)


def mean_of(shares: Sequence[float], intervals: Sequence[Interval]) -> tuple[float, Interval]:
    """The mean of independent shares, and its interval from theirs (Zou and Donner 2008, eq. 2)."""
    count, mean = len(shares), sum(shares) / len(shares)
    pairs = list(zip(shares, intervals, strict=True))
    below = sum((share - low) ** 2 for share, (low, _) in pairs) ** 0.5 / count
    above = sum((high - share) ** 2 for share, (_, high) in pairs) ** 0.5 / count
    return mean, (mean - below, mean + above)


def class_shift(ours: Mapping[str | int, int], theirs: Mapping[str | int, int], seed: int) -> tuple[float, bool]:
    """How far apart the classes of two sets of images are, which are counted by class: the share of images that would
    have to be of another class (total variation distance), and whether that is beyond chance.

    Chance is how all images would be divided at random into two sets of these sizes. Beyond it is a distance of
    `NOTABLE` or more and over `DEVIATIONS` deviations above the mean of `DIVISIONS` divisions (by `seed`), and a class
    that is missing on one side, as any of the classes is in less than one of 1 / `RARE` divisions.
    """
    classes = sorted({**ours, **theirs}, key=str)
    mine, other = (np.array([side.get(one, 0) for one in classes]) for side in (ours, theirs))  # (C,)
    size, both = int(mine.sum()), mine + other

    def apart(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts / size - (both - counts) / other.sum()).sum(-1) / 2

    divided = np.random.default_rng(seed).multivariate_hypergeometric(both, size, DIVISIONS)  # (DIVISIONS, C)
    found, drawn = float(apart(mine)), apart(divided)
    # At most so often an image, and with `both` as power all of a class, falls to the side that has them.
    missing = np.where(mine == 0, other.sum(), np.where(other == 0, size, both.sum())) / both.sum()
    is_shift = found >= NOTABLE and found > drawn.mean() + DEVIATIONS * drawn.std()
    return found, bool(is_shift or len(both) * (missing**both).min() < RARE)
