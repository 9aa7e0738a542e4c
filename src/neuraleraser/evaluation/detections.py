"""Detections before and after erasure, counted by a judge that counts, as tables on I2P add them up.

An image may hold several of one class, so these are no shares of images. They are counted in the pictures of the run's
folder: results keep the highest probability of each class alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuraleraser.evaluation.measure import ErasureFigures
from neuraleraser.evaluation.protocol import MAIN_GROUPS, Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE
from neuraleraser.evaluation.run_folder import CellKey, RunFolder
from neuraleraser.judges import CountingJudge

_BATCH = 32


@dataclass(frozen=True)
class DetectionCounts:
    """Detections above the judge's thresholds, by class, in as many images before and after.

    Examples:
        >>> from neuraleraser.evaluation.detections import DetectionCounts
        >>> found = DetectionCounts(images=100, base={"BELLY_EXPOSED": 9}, after={"BELLY_EXPOSED": 1})
        >>> found.total_base, found.total_after
        (9, 1)
    """

    images: int
    """Images before, and as many after."""
    base: Mapping[str, int]
    """Detections of each class in the base model's images."""
    after: Mapping[str, int]
    """The same with the method applied."""

    @property
    def total_base(self) -> int:
        """Detections of all classes in the base model's images."""
        return sum(self.base.values())

    @property
    def total_after(self) -> int:
        """The same with the method applied."""
        return sum(self.after.values())

    def rows(self) -> list[tuple[str, int, int]]:
        """Return each class with its detections before and after, the total last.

        Returns:
            Name, before, after.
        """
        return [(name, n, self.after[name]) for name, n in self.base.items()] + [
            ("total", self.total_base, self.total_after)
        ]


def detection_counts(
    erasures: Sequence[ErasureFigures], run: RunFolder, protocol: EvaluationProtocol, judge: CountingJudge
) -> dict[tuple[str, str], DetectionCounts]:
    """Return the counts by method and concept, over the cells of the main groups.

    Images that have the bits of the base are not looked at twice. Raises FileError for a picture that is gone.
    """
    found, known = {}, {}
    for e in erasures:
        cells = [c for c in protocol.cells[e.concept] if c.group in MAIN_GROUPS]
        totals = np.zeros((2, len(judge.classes)), np.int64)
        for start in range(0, len(cells), _BATCH):
            totals += _counted(cells[start : start + _BATCH], e, run, judge, known)
        base, after = (dict(zip(judge.classes, row.tolist(), strict=True)) for row in totals)
        found[e.method, e.concept] = DetectionCounts(len(cells), base, after)
    return found


def _counted(
    cells: Sequence[Cell],
    e: ErasureFigures,
    run: RunFolder,
    judge: CountingJudge,
    known: dict[CellKey, NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Return the detections in some cells, before and after: [2, classes]. `known` are those of base images."""
    base, after = ([run.image(*place, c) for c in cells] for place in ((BASE, ""), (e.method, e.concept)))
    new = [i for i, c in enumerate(cells) if c.key not in known]
    changed = [i for i in range(len(cells)) if not np.array_equal(base[i], after[i])]
    for i, row in zip(new, judge.count(np.stack([base[i] for i in new])) if new else (), strict=True):
        known[cells[i].key] = row
    rows = [known[c.key] for c in cells]
    later = list(rows)
    for i, row in zip(changed, judge.count(np.stack([after[i] for i in changed])) if changed else (), strict=True):
        later[i] = row
    return np.stack([np.sum(rows, axis=0), np.sum(later, axis=0)])
