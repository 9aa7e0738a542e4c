"""Figures that others publish, by their own definitions and names, so that their tables can stand by ours.

They judge by the most probable class, without threshold and without looking at the base's image: a base that
cannot draw a concept scores a perfect UA. Compare them with published figures only, and never with `metrics`.
Cells count as *unstyled* when they ask for no style or for UnlearnCanvas's `Seed_Images` (photographs), which
are off-distribution in the authors' own model and are not among the 50 styles that they average. Only cells
of one object count: the answer sets have no others. A judge that knows one domain only gives no figure of the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation.intervals import Estimate, proportion
from neuraleraser.evaluation.metrics import PairedResults, is_target
from neuraleraser.evaluation.results import Results


def unlearncanvas(t: PairedResults, *, seed: int = 0) -> dict[str, Estimate | None]:
    """UA, IRA and CRA of the UnlearnCanvas benchmark (arXiv 2402.11846), all from styled images.

    UA: share of the images that ask for the target and are not classified as it. IRA: accuracy of the other
    concepts of the target's domain. CRA: accuracy in the other domain, over the whole answer set. Means are
    over images, which equals the mean over concepts in their balanced answer set. None where there are no images.
    """
    styled = _has_style(t.after) & _has_one_object(t.after)
    target, other_domain = is_target(t.after, t.concept), "object" if t.kind == "style" else "style"
    return {
        "UA": _share(lambda: ~_top_right(t.after, t.kind), styled & target, "UnlearnCanvas UA", seed),
        "IRA": _share(lambda: _top_right(t.after, t.kind), styled & ~target, "UnlearnCanvas IRA", seed),
        "CRA": _share(lambda: _top_right(t.after, other_domain), styled, "UnlearnCanvas CRA", seed),
    }


def saeuron(t: PairedResults, *, seed: int = 0) -> dict[str, Estimate | None]:
    """UA, IRA and CRA as SAeUron's code computes them (since its PR #6, for objects).

    For a style: UA and IRA as in UnlearnCanvas, but CRA from unstyled images alone. For an object: UA and IRA
    from styled and unstyled images together, CRA from all styled images. None where there are no images.
    """
    styled, single = _has_style(t.after), _has_one_object(t.after)
    target, other_domain = is_target(t.after, t.concept), "object" if t.kind == "style" else "style"
    in_domain, cross = (styled, ~styled) if t.kind == "style" else (np.ones_like(styled), styled)
    return {
        "UA": _share(lambda: ~_top_right(t.after, t.kind), in_domain & target & single, "SAeUron UA", seed),
        "IRA": _share(lambda: _top_right(t.after, t.kind), in_domain & ~target & single, "SAeUron IRA", seed),
        "CRA": _share(lambda: _top_right(t.after, other_domain), cross & single, "SAeUron CRA", seed),
    }


def _has_style(results: Results) -> np.ndarray:
    return ~np.isin(results.cell_style, ["", "Seed_Images"])


def _has_one_object(results: Results) -> np.ndarray:
    return np.array([len(objects) == 1 for objects in results.cell_objects], dtype=bool)


def _top_right(results: Results, kind: str) -> np.ndarray:
    """Tell whether the most probable class of the domain is the one asked for (the first of equals): bool [n]."""
    names, values = results.judge.classes(kind), results.p_style if kind == "style" else results.p_object
    if not names:
        raise DataError(f"the judge knows no {kind}")
    top = np.array(names, dtype=object)[values.argmax(axis=1)]
    if kind == "style":
        return top == results.cell_style
    return np.array([name in objects for name, objects in zip(top, results.cell_objects, strict=True)], dtype=bool)


def _share(good: Callable[[], np.ndarray], rows: np.ndarray, what: str, seed: int) -> Estimate | None:
    try:
        return proportion(good(), rows, f"images ({what})", seed)
    except DataError:
        return None
