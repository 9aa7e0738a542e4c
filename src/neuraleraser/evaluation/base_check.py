"""A look at the base model's images before any method's are drawn: can the judge read them?"""

from __future__ import annotations

from collections.abc import Iterable

from neuraleraser.errors import DataError, SettingsError
from neuraleraser.evaluation import metrics
from neuraleraser.evaluation.protocol import GRID
from neuraleraser.evaluation.results import Results

READABLE = 0.5
"""Share of the base model's images that a judge of it is right in, at least."""
_FEWEST = 20


def check_readable(base: Results, kinds: Iterable[str]) -> None:
    """Raise SettingsError if the judge is surely right in less than half of the base model's images of one of `kinds`.

    A judge of another model, or one whose classes are in another order, calls almost every image wrong, and so every
    method good. Fewer than 20 images decide nothing.
    """
    grid = base.where(base.group == GRID)
    for kind in sorted(set(kinds)):
        try:
            found = metrics.accuracy(grid, kind)
        except DataError:  # no image asks for what the judge knows
            continue
        if found.n >= _FEWEST and found.high < READABLE:
            raise SettingsError(
                f"the judge is right in {found} of the base model's own images that ask for a known {kind}, before "
                "anything is erased: it was not trained for this model, or its classes are in another order. Pass a "
                "judge that reads this model's images"
            )
