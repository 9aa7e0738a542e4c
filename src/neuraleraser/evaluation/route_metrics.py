"""The metrics of pictures that start from a picture of the concept, by group of cells and strength, and of those whose
prompt holds embeddings that were learned for it.

Of little noise a start image shows through whatever is asked for. So beside what a method leaves stands the *ceiling*:
the base model, asked from the same start images for the same pictures without the concept. Learned embeddings have
none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from neuraleraser.evaluation.intervals import Estimate, proportion
from neuraleraser.evaluation.metrics import PairedResults, estimate_or_none, is_target, shown_share, shows_concept
from neuraleraser.evaluation.protocol import CEILING_OF, LEARNED
from neuraleraser.evaluation.results import BASE, Results


@dataclass(frozen=True)
class RouteFigures:
    """The figures of one method and concept, of one group of cells at one strength of its start images, 0 without."""

    group: str
    strength: float
    figures: Mapping[str, Estimate | None]


def shown_after(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of images that show the concept with the method applied. Raises DataError if there are no images."""
    return _share_shown(t.after, t.kind, t.concept, seed)


def acted_share(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of images in which the method says that it acts. Raises DataError if it says so of none."""
    names = t.after.identities()
    watched, acted = (t.base.lists_name(c, names) | t.after.lists_name(c, names) for c in ("watched", "fired"))
    return proportion(acted, watched, "images of which the method says where it acts (acted)", seed)


def ceiling_cells(results: Results, group: str, strength: float, concept: str) -> np.ndarray:
    """Tell which rows are the ceiling of a group at a strength: of the base, started from a picture of the concept,
    asked for what does not have it: bool [n]."""
    started = np.array([concept in names for names in results.start], dtype=bool)
    at = (results.method == BASE) & (results.group == CEILING_OF.get(group)) & (results.strength == strength)
    return at & started & ~is_target(results, concept)


ROUTE_METRICS: Mapping[str, Callable[..., Estimate]] = {
    "shown_base": shown_share,
    "shown_after": shown_after,
    "acted": acted_share,
}
"""The metrics of the pairs of one group and strength, by name; the ceiling is of other images."""


def route_figures(results: Results, t: PairedResults) -> list[RouteFigures]:
    """Return the figures of each group that starts from pictures, at each of its strengths, and of learned embeddings;
    `results` hold ceilings."""
    found = []
    for group in (*CEILING_OF, LEARNED):
        of_group = t.where(t.after.group == group)
        for strength in sorted(set(of_group.after.strength.tolist())):
            part = of_group.where(of_group.after.strength == strength)
            figures = {name: estimate_or_none(metric, part) for name, metric in ROUTE_METRICS.items()}
            ceiling = results.where(ceiling_cells(results, group, strength, t.concept))
            figures["ceiling"] = _share_shown(ceiling, t.kind, t.concept, 0) if len(ceiling) else None
            found.append(RouteFigures(group, strength, figures))
    return found


def _share_shown(results: Results, kind: str, concept: str, seed: int) -> Estimate:
    rows = np.ones(len(results), dtype=bool)
    return proportion(shows_concept(results, kind, concept), rows, f"images that start from {concept!r}", seed)
