"""The metrics of what the erasure of one concept costs every other one.

Of each class apart: of the images that ask for it, do not ask for the erased concept and are right in the base, the
share that still is (`still_right`), whose rest is the class's *loss*. Gains offset nothing, so that a class cannot pay
in one image and be paid back in another.

*Look-alikes* of a concept are the classes of its domain that the judge takes the base's own images of it for: those
with the largest mean probability over the base images that ask for it (and, if it is an object, for no other one).
Erasing is known to hurt what looks like the concept more than what does not, and a mean over all classes hides that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation.intervals import Estimate, proportion
from neuraleraser.evaluation.metrics import PairedResults, asked_classes, classes_right, estimate_or_none, is_target

LOOKALIKES = 3
"""Look-alikes of a concept, at most; never more than half of the other classes of its domain that have images."""


@dataclass(frozen=True)
class ClassDamage:
    """Images of one class that is not erased, and how many are still right.

    Examples:
        >>> found = report.of("none", "Van_Gogh").damage  # of the classes that the base draws right
        >>> {d.loss for d in found} <= {0.0}, "Van_Gogh" in {d.name for d in found}
        (True, False)
    """

    name: str
    kind: str
    """"style" or "object"."""
    still_right: Estimate
    """Of its images that are right in the base, the share that still is."""

    @property
    def loss(self) -> float:
        """The share that is lost."""
        return 1 - self.still_right.value


@dataclass(frozen=True)
class LookAlikes:
    """The classes that look like the erased one, and how much more than the rest of its domain they lose.

    Examples:
        >>> from neuraleraser.evaluation.damage_metrics import LookAlikes
        >>> LookAlikes((("Watercolor", 0.03), ("Crayon", 0.01)), gap=None).names[0]
        ('Watercolor', 0.03)
    """

    names: tuple[tuple[str, float], ...]
    """(name, mean probability of it on the base's images of the erased concept), largest first."""
    gap: Estimate | None
    """`lookalike_loss` less `rest_loss`; None where one of them has no images."""


def damage(t: PairedResults, *, seed: int = 0) -> list[ClassDamage]:
    """Return the damage to every class of both domains that has images which count, in the judge's order."""
    found = []
    for kind in ("style", "object"):
        rows, still = _right_in_base(t, kind)
        for i, name in enumerate(t.base.judge.classes(kind)):
            if name != t.concept and rows[:, i].any():
                share = proportion(still[:, i], rows[:, i], f"base images with the right {name!r} (still_right)", seed)
                found.append(ClassDamage(name, kind, share))
    return found


def lookalikes(t: PairedResults) -> list[tuple[str, float]]:
    """Return the look-alikes of the erased concept with their mean probabilities, largest first.

    Raises DataError if fewer than two other classes of the domain have images that count, or no base image asks for the
    concept (and, if it is an object, for that alone).
    """
    names, counted = t.base.judge.classes(t.kind), np.any(_right_in_base(t, t.kind)[0], axis=0)
    others = [i for i, name in enumerate(names) if counted[i] and name != t.concept]
    single = np.array([len(objects) == 1 for objects in t.base.cell_objects], dtype=bool)
    rows = is_target(t.base, t.concept) & (single | (t.kind == "style"))
    if len(others) < 2 or not rows.any():
        raise DataError(
            f"{int(rows.sum())} base images ask for {t.concept!r}, and {len(others)} other classes of its domain have "
            "images that the base draws right: look-alikes need one image and two classes"
        )
    values = t.base.p_style if t.kind == "style" else t.base.p_object
    means = values[rows].astype(np.float64).mean(0)
    ranked = sorted(others, key=lambda i: -means[i])
    return [(names[i], float(means[i])) for i in ranked[: min(LOOKALIKES, len(others) // 2)]]


def lookalike_loss(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share, of the look-alikes' images that are right in the base, of those that no longer are. Raises DataError if
    there are none, or no look-alikes.
    """
    return _loss(t, {name for name, _ in lookalikes(t)}, "look-alikes", seed)


def rest_loss(t: PairedResults, *, seed: int = 0) -> Estimate:
    """The same of all other classes of the domain. Raises DataError as `lookalike_loss` does."""
    alike = {t.concept, *(name for name, _ in lookalikes(t))}
    return _loss(t, set(t.base.judge.classes(t.kind)) - alike, "other classes", seed)


DAMAGE_METRICS: Mapping[str, Callable[..., Estimate]] = {"lookalike_loss": lookalike_loss, "rest_loss": rest_loss}
"""The metrics of look-alikes by name."""


def lookalike_damage(t: PairedResults, *, seed: int = 0) -> LookAlikes | None:
    """Return the look-alikes and how much more they lose than the rest; None if there are none."""
    try:
        names = tuple(lookalikes(t))
    except DataError:
        return None
    near, rest = (estimate_or_none(metric, t, seed) for metric in (lookalike_loss, rest_loss))
    return LookAlikes(names, None if near is None or rest is None else difference_of(near, rest))


def difference_of(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b of independent estimates. Its interval is put together from theirs (Zou and Donner 2008, 'MOVER'),
    so that it has a width where all images of one agree."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, a.n + b.n, low, high)


def _right_in_base(t: PairedResults, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """-> images of each class, without the erased concept, that are right in the base; right after: bool [n, classes]
    each."""
    counted = asked_classes(t.base, kind) & ~is_target(t.base, t.concept)[:, None]
    return counted & classes_right(t.base, kind), classes_right(t.after, kind)


def _loss(t: PairedResults, names: set[str], what: str, seed: int) -> Estimate:
    rows, still = _right_in_base(t, t.kind)
    some = np.array([name in names for name in t.base.judge.classes(t.kind)], dtype=bool)
    lost = ~still[:, some]
    return proportion(lost.ravel(), rows[:, some].ravel(), f"base images with the right {what} ({t.concept!r})", seed)
