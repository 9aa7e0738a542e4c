"""A measured value: a ratio of two sums over images, with a bootstrap interval.

The interval is a percentile bootstrap: images are drawn with replacement, an image and its twin together,
1000 times, and the interval holds the middle 95 %. A draw in which the lower sum is zero has no value and is
left out. At a value of exactly 0 or 1 such an interval has no width; read `n` then: the true share may still
be off by about 3/n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A value with the number of images it rests on and the ends of its 95 % bootstrap interval."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}\u2013{self.high:.2f})"


def ratio(top: np.ndarray, bottom: np.ndarray, rows: np.ndarray, what: str, seed: int) -> Measure:
    """sum(top) / sum(bottom) over `rows`, with its bootstrap interval; all three bool [n].

    Images with the same (top, bottom) are interchangeable, so drawing n images with replacement is drawing
    how many of each of the four combinations there are: one multinomial draw, whatever n is. It also makes
    the interval independent of the order of rows.
    """
    n = int(rows.sum())
    if n == 0:
        raise DataError(f"There are no {what}; add images to the verdicts, or leave this metric out.")
    if not bottom[rows].any():
        raise DataError(
            f"The base is right in none of {n} {what}, so there is nothing to divide by; "
            "use a base that can draw these cells."
        )
    counts = np.bincount(2 * top[rows].astype(int) + bottom[rows].astype(int), minlength=4)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=DRAWS)  # [draws, 4]
    tops, bottoms = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measure(float((counts[2] + counts[3]) / (counts[1] + counts[3])), n, float(low), float(high))
