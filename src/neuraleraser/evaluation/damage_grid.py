"""The table of which concept paid for which erasure: a grid a method, erased concepts across, kept ones down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuraleraser.evaluation.damage_metrics import ClassDamage
from neuraleraser.evaluation.report import ErasureReport

Cells = Sequence[ClassDamage | None]


@dataclass(frozen=True)
class DamageGrid:
    """One method's losses. Concepts from which no erasure takes anything have no row, and are counted."""

    method: str
    erased: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, tuple[tuple[str, Cells], ...]], ...]
    """(kind, ((kept concept, its cells, one a column), ...)), styles first; None where a concept has no images that
    count, as it has not in its own column."""
    whole: tuple[tuple[str, int], ...]
    """(kind, number of concepts of it from which nothing is lost)."""


def damage_grids(entries: Sequence[ErasureReport]) -> list[DamageGrid]:
    """Return a grid of each method of which a report holds the damage, in the order of the report."""
    methods: dict[str, list[ErasureReport]] = {}
    for entry in entries:
        if entry.damage:
            methods.setdefault(entry.method, []).append(entry)
    return [_grid(method, some) for method, some in methods.items()]


def _grid(method: str, entries: Sequence[ErasureReport]) -> DamageGrid:
    columns = [{(d.kind, d.name): d for d in entry.damage} for entry in entries]
    kept = dict.fromkeys(key for column in columns for key in column)
    rows, whole = [], []
    for kind in ("style", "object"):
        lines = [(name, [column.get((kind, name)) for column in columns]) for k, name in kept if k == kind]
        hurt = tuple((name, cells) for name, cells in lines if any(d is not None and d.loss > 0 for d in cells))
        rows += [(kind, hurt)] if hurt else []
        whole += [(kind, len(lines) - len(hurt))] if len(lines) > len(hurt) else []
    return DamageGrid(method, tuple(entry.concept for entry in entries), tuple(rows), tuple(whole))
