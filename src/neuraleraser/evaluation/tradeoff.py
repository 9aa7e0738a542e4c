"""Plots of what each method pays for what it erases: a method a point, the mean over its concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuraleraser.evaluation.report import ErasureReport, value_of

AXES = (("artefact_rate_target", "artefacts", False), ("unchanged_share", "unchanged", True))
"""What stands against `ua`: figure, label, and True if more is better."""
_CLOSE = 0.05  # of an axis: nearer points share a label


@dataclass(frozen=True)
class TradeoffPoint:
    """One method in a plot, both values in 0..1."""

    method: str
    erased: float
    other: float
    concepts: tuple[tuple[float, float], ...]
    """The same of each concept alone."""


@dataclass(frozen=True)
class Tradeoff:
    """One plot."""

    label: str
    more_is_better: bool
    points: tuple[TradeoffPoint, ...]

    @property
    def labels(self) -> list[tuple[float, float, str]]:
        """(erased, other, text) of each label: numbers of the methods, one label for points that nearly coincide."""
        groups: list[list[int]] = []
        for i, p in enumerate(self.points):
            near = [g for g in groups if _close(self.points[g[0]], p)]
            if near:
                near[0].append(i)
            else:
                groups.append([i])
        return [(self.points[g[0]].erased, self.points[g[0]].other, ", ".join(str(i + 1) for i in g)) for g in groups]


def tradeoffs(entries: Sequence[ErasureReport]) -> list[Tradeoff]:
    """Return the plots in which two methods or more have a point; each takes the concepts that have both figures, and
    all plots hold the same methods, in the order of the report."""
    plots = []
    for name, label, more in AXES:
        found: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            x, y = value_of(entry.figures.get("ua")), value_of(entry.figures.get(name))
            if x is not None and y is not None:
                found.setdefault(entry.method, []).append((x, y))
        points = [TradeoffPoint(method, *_mean(values), tuple(values)) for method, values in found.items()]
        if len(points) > 1:
            plots.append(Tradeoff(label, more, tuple(points)))
    return plots


def _mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in values) / len(values), sum(y for _, y in values) / len(values)


def _close(a: TradeoffPoint, b: TradeoffPoint) -> bool:
    return abs(a.erased - b.erased) < _CLOSE and abs(a.other - b.other) < _CLOSE
