"""Estimates: a ratio of two sums over images, with a 95 % interval.

In general the interval is a percentile bootstrap: images are drawn with replacement, an image and its twin together,
1000 times, and the interval holds the middle 95 %. A draw in which the lower sum is zero has no value and is left out.

Where all images agree such an interval has no width, and says nothing of what more images would show. There the
interval is exact (Clopper and Pearson 1934). If 0 of n images deviate, the true share that does is at most
u = 1 - (alpha / 2)^(1 / n):

- a proportion (every image counts below) that is 1 lies in [1 - u, 1], one that is 0 in [0, u];
- a ratio to the base's images, b of n, from which no image deviates lies in 1 -+ u n / b, one that is 0 in
  [0, u n / b].

A mean of values has the bootstrap's interval, whatever they are: of few, or of equal ones, it says little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError

RESAMPLES = 1000
"""Bootstrap samples of an interval."""
CONFIDENCE = 0.95
"""Share of the samples that lie in an interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with the number of images it rests on and the ends of its 95 % interval.

    Examples:
        >>> share = report.of("none", "Van_Gogh").figures["unchanged_share"]
        >>> share.low < share.value == share.high == 1, share.n
        (True, 2)
    """

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}\u2013{self.high:.2f}, n = {self.n})"


def unanimous_bound(n: int) -> float:
    """Return the upper end of the Clopper-Pearson interval of 0 in n."""
    return 1 - ((1 - CONFIDENCE) / 2) ** (1 / n)


def ratio(top: np.ndarray, bottom: np.ndarray, rows: np.ndarray, what: str, seed: int) -> Estimate:
    """Return sum(top) / sum(bottom) over `rows`, with its interval; all three bool [n].

    Images with the same (top, bottom) are interchangeable, so drawing n images with replacement is drawing
    how many of each of the four combinations there are: one multinomial draw, whatever n is. It also makes
    the interval independent of the order of rows.

    Raises DataError if there are no rows, or no image to divide by.
    """
    n = int(rows.sum())
    if n == 0:
        raise DataError(f"there are no {what}: add images to the results, or leave this metric out")
    top, bottom = top[rows], bottom[rows]
    count, out_of = int(top.sum()), int(bottom.sum())
    if not out_of:
        raise DataError(
            f"the base is right in none of {n} {what}, so there is nothing to divide by: "
            "use a base that can draw these cells"
        )
    value, slack = count / out_of, unanimous_bound(n) * n / out_of
    if count == 0:
        return Estimate(0.0, n, 0.0, min(slack, 1.0) if out_of == n else slack)
    if (top == bottom).all():
        return Estimate(1.0, n, max(0.0, 1 - slack), 1.0 if out_of == n else 1 + slack)
    counts = np.bincount(2 * top.astype(int) + bottom.astype(int), minlength=4)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)  # [draws, 4]
    tops, bottoms = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, n, float(low), float(high))


def proportion(good: np.ndarray, rows: np.ndarray, what: str, seed: int) -> Estimate:
    """Return the share of `rows` that are `good`, both bool [n]. Raises DataError if there are no rows."""
    return ratio(good, np.ones_like(rows), rows, what, seed)


def mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean of values [n] with its bootstrap interval. Raises DataError if there are none."""
    n = len(values)
    if not n:
        raise DataError("there are no values to take the mean of: pass at least one")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile(counts @ values / n, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values.mean()), n, float(low), float(high))
