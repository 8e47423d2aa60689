"""Shares of what is right and wrong, with their intervals. Pure functions."""

from collections.abc import Sequence

Interval = tuple[float, float]
Z = 1.96
"""Standard deviations to either side that hold 95 % of a normal distribution."""


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
