"""Figures that others publish, by their own definitions and names, so that their tables can stand by ours.

They judge by the most probable class, without threshold and without looking at the base's image: a base that
cannot draw a concept scores a perfect UA. Compare them with published figures only, and never with `metrics`.
Cells count as *unstyled* when they ask for no style or for UnlearnCanvas's `Seed_Images` (photographs), which
are off-distribution in the authors' own model and are not among the 50 styles that they average. Only cells
of one object count: the answer sets have no others.
"""

from __future__ import annotations

import numpy as np

from neuraleraser.bench.measure import Measure, ratio
from neuraleraser.bench.metrics import Twins, own_cells
from neuraleraser.bench.verdicts import Verdicts


def unlearncanvas(t: Twins, *, seed: int = 0) -> dict[str, Measure]:
    """UA, IRA and CRA of the UnlearnCanvas benchmark (arXiv 2402.11846), all from styled images.

    UA: share of the images that ask for the target and are not classified as it. IRA: accuracy of the other
    concepts of the target's domain. CRA: accuracy in the other domain, over the whole answer set. Means are
    over images, which equals the mean over concepts in their balanced answer set.

    Raises:
        DataError: there are no images for one of them.
    """
    styled = _styled(t.after) & _single(t.after)
    own, other_domain = own_cells(t.after, t.concept), "object" if t.kind == "style" else "style"
    return {
        "UA": _share(~_top_right(t.after, t.kind), styled & own, "UnlearnCanvas UA", seed),
        "IRA": _share(_top_right(t.after, t.kind), styled & ~own, "UnlearnCanvas IRA", seed),
        "CRA": _share(_top_right(t.after, other_domain), styled, "UnlearnCanvas CRA", seed),
    }


def saeuron(t: Twins, *, seed: int = 0) -> dict[str, Measure]:
    """UA, IRA and CRA as SAeUron's code computes them (since its PR #6, for objects).

    For a style: UA and IRA as in UnlearnCanvas, but CRA from unstyled images alone. For an object: UA and IRA
    from styled and unstyled images together, CRA from all styled images.

    Raises:
        DataError: there are no images for one of them.
    """
    styled, single = _styled(t.after), _single(t.after)
    own = own_cells(t.after, t.concept)
    in_domain, other_domain = _top_right(t.after, t.kind), "object" if t.kind == "style" else "style"
    mine, cross = (styled, ~styled) if t.kind == "style" else (np.ones_like(styled), styled)
    return {
        "UA": _share(~in_domain, mine & own & single, "SAeUron UA", seed),
        "IRA": _share(in_domain, mine & ~own & single, "SAeUron IRA", seed),
        "CRA": _share(_top_right(t.after, other_domain), cross & single, "SAeUron CRA", seed),
    }


def _styled(table: Verdicts) -> np.ndarray:
    return ~np.isin(table.cell_style, ["", "Seed_Images"])


def _single(table: Verdicts) -> np.ndarray:
    return np.array([len(objects) == 1 for objects in table.cell_objects], dtype=bool)


def _top_right(table: Verdicts, kind: str) -> np.ndarray:
    """Whether the most probable class of the domain is the one asked for (the first of equals): bool [n]."""
    if kind == "style":
        return np.array(table.styles, dtype=object)[table.p_style.argmax(axis=1)] == table.cell_style
    top = np.array(table.objects, dtype=object)[table.p_object.argmax(axis=1)]
    return np.array([name in objects for name, objects in zip(top, table.cell_objects, strict=True)], dtype=bool)


def _share(true: np.ndarray, rows: np.ndarray, what: str, seed: int) -> Measure:
    return ratio(true & rows, rows, rows, f"images for {what}", seed)
