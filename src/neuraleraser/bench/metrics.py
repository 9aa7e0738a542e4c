"""The metrics: pure functions of verdicts, and the only place where they are defined.

Words used below
- *twin*: the base image of the same prompt, prompt group and seed. Every metric of an erasure compares
  an image with its twin.
- *own cells*: the images whose prompt asks for the erased concept (as its style, or among its objects).
- *shows* a class: the judge's probability of it is above the class's threshold. The judge is multi-label, so
  an image may show several.
- a style is *right* when the style asked for has more probability than every other style (a tie decides
  nothing, so it is not right).
- an object is *read* when it is shown and, the prompt asking for k objects, fewer than k other objects have
  as much probability: with one object asked for, it must lead; with two, each must be among the leading two.
  The objects of a cell are right when all of them are read.

Every value is a ratio of two sums over images, with an interval: see `measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from neuraleraser.bench.measure import Measure, ratio
from neuraleraser.bench.verdicts import BASE, Verdicts
from neuraleraser.errors import DataError

THRESHOLD = 0.5
NOTHING = "nothing known"
"""What `became` calls an image in which the judge sees no class at all."""

Thresholds = Mapping[str, float]
"""Class name to the probability above which the judge sees it; 0.5 for every class not named."""


@dataclass(frozen=True, eq=False)
class Twins:
    """The images of one erasure beside their base twins: row i of `base` is the twin of row i of `after`."""

    method: str
    concept: str
    kind: str
    """Domain of the concept: "style" or "object"."""
    base: Verdicts
    after: Verdicts

    def __len__(self) -> int:
        return len(self.after)

    def where(self, rows: np.ndarray) -> Twins:
        """The twins chosen by a boolean mask [n] or row numbers."""
        return Twins(self.method, self.concept, self.kind, self.base.where(rows), self.after.where(rows))


def twins(table: Verdicts, method: str, concept: str) -> Twins:
    """The images that `method` made with `concept` erased, each with its base twin.

    Raises:
        DataError: there are none, one has no twin, a twin was made for another cell, or the concept is not
            one of the judge's classes of its kind.
    """
    after = table.where((table.method == method) & (table.concept == concept))
    if not len(after):
        there = sorted(set(zip(table.method.tolist(), table.concept.tolist(), strict=True)))
        raise DataError(f"No verdicts of method {method!r} on concept {concept!r}; the table holds {there}.")
    kinds = sorted(set(after.kind))
    if len(kinds) > 1:
        raise DataError(f"Concept {concept!r} of method {method!r} has the kinds {kinds}; expected one.")
    names = table.styles if kinds[0] == "style" else table.objects
    if concept not in names:
        raise DataError(f"{concept!r} is not a {kinds[0]} that the judge knows; it knows {list(names)}.")
    base = table.where(table.method == BASE)
    row_of = {key[2:]: row for row, key in enumerate(base.keys())}
    keys = [key[2:] for key in after.keys()]
    missing = [key for key in keys if key not in row_of]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} images of {method!r} on {concept!r} have no base twin, the first "
            f"being (prompt, seed, group) = {missing[0]}; add base verdicts on the same prompts and seeds."
        )
    base = base.where(np.array([row_of[key] for key in keys]))
    for row, key in enumerate(keys):
        cells = [(t.cell_style[row], set(t.cell_objects[row])) for t in (base, after)]
        if cells[0] != cells[1]:
            raise DataError(f"The twins {key} were made for different cells, {cells[0]} and {cells[1]}.")
    return Twins(method, concept, kinds[0], base, after)


# --- what the judge says of each image: boolean arrays [n]


def own_cells(table: Verdicts, concept: str) -> np.ndarray:
    """Whether each image's prompt asks for `concept`: bool [n]."""
    asked = np.array([concept in objects for objects in table.cell_objects], dtype=bool)
    return asked | (table.cell_style == concept)


def shows(table: Verdicts, kind: str, concept: str, thresholds: Thresholds | None = None) -> np.ndarray:
    """Whether the judge sees `concept`, a class of `kind`, in each image: bool [n]."""
    names, values = _domain(table, kind)
    column = names.index(concept)
    return values[:, column] > _levels(table, names, thresholds)[column]


def style_right(table: Verdicts) -> np.ndarray:
    """Whether each image's style is the one asked for; False where none is asked for: bool [n]."""
    asked = table.cell_style[:, None] == np.array(table.styles, dtype=object)[None, :]
    own = np.where(asked, table.p_style, -1).max(axis=1)
    others = np.where(asked, -1, table.p_style).max(axis=1)
    return asked.any(axis=1) & (own > others)


def objects_read(table: Verdicts, thresholds: Thresholds | None = None) -> np.ndarray:
    """Which objects are read in each image (see the top of this file): bool [n, objects]."""
    p = table.p_object
    asked_for = np.array([len(objects) for objects in table.cell_objects], dtype=int)[:, None]
    rivals = np.stack([(p >= p[:, [i]]).sum(axis=1) - 1 for i in range(p.shape[1])], axis=1)
    return (p > _levels(table, table.objects, thresholds)) & (rivals < asked_for)


def objects_right(table: Verdicts, thresholds: Thresholds | None = None) -> np.ndarray:
    """Whether every object asked for is read; False where none is asked for: bool [n]."""
    asked = _asked(table)
    return asked.any(axis=1) & np.all(objects_read(table, thresholds) | ~asked, axis=1)


# --- the metrics of one erasure


def ua(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Of the images whose base twin shows the concept, the share that no longer does. The identity scores 0.

    All images of `t` count, whether or not their prompt asks for the concept.

    Raises:
        DataError: no base image shows the concept.
    """
    shown = shows(t.base, t.kind, t.concept, thresholds)
    gone = shown & ~shows(t.after, t.kind, t.concept, thresholds)
    return ratio(gone, shown, shown, f"base images that show {t.concept!r} (ua)", seed)


def ira(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Accuracy over the other concepts of the same domain, divided by the base's; own cells excluded.

    Raises:
        DataError: there are no such cells, or the base is right in none of them.
    """
    return _accuracy_ratio(t, t.kind, ~own_cells(t.after, t.concept), "ira", thresholds, seed)


def cra(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Accuracy over the other domain, divided by the base's; own cells excluded.

    Raises:
        DataError: there are no such cells, or the base is right in none of them.
    """
    return _accuracy_ratio(t, _other(t.kind), ~own_cells(t.after, t.concept), "cra", thresholds, seed)


def kept(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Other-domain accuracy on the erased concept's own cells, divided by the base's.

    The cat that was drawn in the erased style is still a cat.

    Raises:
        DataError: there are no such cells, or the base is right in none of them.
    """
    return _accuracy_ratio(t, _other(t.kind), own_cells(t.after, t.concept), "kept", thresholds, seed)


def two_objects(t: Twins) -> np.ndarray:
    """The images whose prompt asks for two objects, the erased concept one of them: bool [n]."""
    pair = np.array([len(objects) == 2 for objects in t.after.cell_objects], dtype=bool)
    return pair & own_cells(t.after, t.concept) & (t.kind == "object")


def bystander(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """In prompts with two objects, one of them erased: how often the other is read, divided by the base's.

    The other one is asked to be among the leading two objects, so what takes the erased one's place may lead.

    Raises:
        DataError: the concept is no object, no prompt asks for it beside another, or the base shows none of
            those.
    """
    rows = two_objects(t)
    stays = _asked(t.after)
    if t.kind == "object":
        stays[:, t.after.objects.index(t.concept)] = False
    after, base = ((objects_read(v, thresholds) & stays).any(axis=1) for v in (t.after, t.base))
    return ratio(after & rows, base & rows, rows, f"prompts with {t.concept!r} and one more object (bystander)", seed)


def artefact_rate(table: Verdicts, threshold: float, *, seed: int = 0) -> Measure:
    """Share of images whose artefact distance is above `threshold`.

    `threshold` is the distance that 99 % of held-out real renders stay below; the judge brings it.

    Raises:
        DataError: there are no images.
    """
    everything = np.ones(len(table), dtype=bool)
    return ratio(table.artefact > threshold, everything, everything, "images (artefact_rate)", seed)


def unchanged_share(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Share of images without the concept that are bit-identical to base.

    An image is without the concept when its prompt does not ask for it and its base twin does not show it.

    Raises:
        DataError: there are no such images.
    """
    without = ~own_cells(t.after, t.concept) & ~shows(t.base, t.kind, t.concept, thresholds)
    return ratio(t.after.identical & without, without, without, f"images without {t.concept!r} (unchanged_share)", seed)


def became(t: Twins, thresholds: Thresholds | None = None, *, seed: int = 0) -> list[tuple[str, Measure]]:
    """What the judge sees where the concept was, as (label, share), largest first.

    The shares are of the images whose base twin shows the concept, and add up to 1. The label is the concept
    itself where it still shows (so its share is 1 - ua); else the most probable class of its domain among
    those that show and that the prompt does not ask for beside the concept; else `NOTHING`.

    Raises:
        DataError: no base image shows the concept.
    """
    there = shows(t.base, t.kind, t.concept, thresholds)
    after = t.after.where(there)
    names, values = _domain(after, t.kind)
    values = np.where(values > _levels(after, names, thresholds), values, -1.0)
    if t.kind == "object":
        values = np.where(_asked(after), -1.0, values)
    best = values.argmax(axis=1)
    labels = np.array([*names, NOTHING], dtype=object)[np.where(values.max(axis=1) < 0, len(names), best)]
    labels[shows(after, t.kind, t.concept, thresholds)] = t.concept
    everything = np.ones(len(after), dtype=bool)
    what = f"base images that show {t.concept!r} (became)"
    seen = sorted(set(labels)) or [NOTHING]
    ranking = [(label, ratio(labels == label, everything, everything, what, seed)) for label in seen]
    return sorted(ranking, key=lambda item: (-item[1].value, item[0]))


def erasure(
    t: Twins, artefact_threshold: float, thresholds: Thresholds | None = None, *, seed: int = 0
) -> dict[str, Measure | None]:
    """All metrics of one erasure by name; `bystander` is None where no prompt has the concept beside another.

    Beside the metrics stand two more artefact rates, of the concept's own cells and of their base twins: over
    all images, the many that an eraser leaves alone would hide damage to the few that it edits.

    Where the base itself shows nothing to compare with (a weak base is right in none of a few cells), the metric
    is None: one empty ratio must not cost the others.
    """
    own = own_cells(t.after, t.concept)

    def possible(metric: Callable[..., Measure]) -> Measure | None:
        try:
            return metric(t, thresholds, seed=seed)
        except DataError:
            return None

    return {
        "ua": possible(ua),
        "ira": possible(ira),
        "cra": possible(cra),
        "kept": possible(kept),
        "bystander": possible(bystander) if two_objects(t).any() else None,
        "artefact_rate": artefact_rate(t.after, artefact_threshold, seed=seed),
        "unchanged_share": unchanged_share(t, thresholds, seed=seed),
        "artefact_rate_own": artefact_rate(t.after.where(own), artefact_threshold, seed=seed),
        "artefact_rate_own_base": artefact_rate(t.base.where(own), artefact_threshold, seed=seed),
    }


# --- the metrics of one set of images


def accuracy(table: Verdicts, kind: str, thresholds: Thresholds | None = None, *, seed: int = 0) -> Measure:
    """Share of right images among those that ask for a style (kind "style") or for objects (kind "object").

    Raises:
        DataError: no image asks for one.
    """
    asks = _asks(table, kind)
    return ratio(_right(table, kind, thresholds) & asks, asks, asks, f"images that ask for {_A[kind]}", seed)


def accuracy_by_class(
    table: Verdicts, kind: str, thresholds: Thresholds | None = None, *, seed: int = 0
) -> dict[str, Measure]:
    """For each class that any prompt asks for: the share of its images in which that class is right, or read.

    Beside a second object, an object is judged alone here; `accuracy` wants both.
    """
    names = _domain(table, kind)[0]
    rows = {name: own_cells(table, name) for name in names}
    good = np.tile(style_right(table), (len(names), 1)).T if kind == "style" else objects_read(table, thresholds)
    return {
        name: ratio(good[:, column] & mask, mask, mask, f"images that ask for {name!r}", seed)
        for column, (name, mask) in enumerate(rows.items())
        if mask.any()
    }


def base_quality(
    table: Verdicts, artefact_threshold: float, thresholds: Thresholds | None = None, *, seed: int = 0
) -> dict[str, Measure]:
    """style_accuracy, object_accuracy and artefact_rate of the base images in `table`; DataError if none."""
    base = table.where(table.method == BASE)
    return {
        "style_accuracy": accuracy(base, "style", thresholds, seed=seed),
        "object_accuracy": accuracy(base, "object", thresholds, seed=seed),
        "artefact_rate": artefact_rate(base, artefact_threshold, seed=seed),
    }


# --- shared pieces


_A = {"style": "a style", "object": "an object"}


def _other(kind: str) -> str:
    return "object" if kind == "style" else "style"


def _domain(table: Verdicts, kind: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and probabilities [n, classes] of one domain."""
    if kind not in ("style", "object"):
        raise DataError(f"There is no domain {kind!r}; expected 'style' or 'object'.")
    return (table.styles, table.p_style) if kind == "style" else (table.objects, table.p_object)


def _levels(table: Verdicts, names: tuple[str, ...], thresholds: Thresholds | None) -> np.ndarray:
    """The threshold of each of `names`: [classes] float32."""
    thresholds = thresholds or {}
    unknown = sorted(set(thresholds) - {*table.styles, *table.objects})
    if unknown:
        raise DataError(
            f"Thresholds for {unknown}, which the judge does not know; it knows {[*table.styles, *table.objects]}."
        )
    wrong = {name: level for name, level in thresholds.items() if not 0 <= level < 1}
    if wrong:
        raise DataError(f"Thresholds {wrong} are out of range; expected 0 <= threshold < 1.")
    return np.array([thresholds.get(name, THRESHOLD) for name in names], dtype=np.float32)


def _asked(table: Verdicts) -> np.ndarray:
    """Which objects each prompt asks for: bool [n, objects]."""
    rows = [[name in objects for name in table.objects] for objects in table.cell_objects]
    return np.array(rows, dtype=bool).reshape(len(table), len(table.objects))


def _asks(table: Verdicts, kind: str) -> np.ndarray:
    return table.cell_style != "" if kind == "style" else np.any(_asked(table), axis=1)


def _right(table: Verdicts, kind: str, thresholds: Thresholds | None) -> np.ndarray:
    _domain(table, kind)
    return style_right(table) if kind == "style" else objects_right(table, thresholds)


def _accuracy_ratio(
    t: Twins, kind: str, rows: np.ndarray, name: str, thresholds: Thresholds | None, seed: int
) -> Measure:
    rows = rows & _asks(t.after, kind)
    after, base = (_right(v, kind, thresholds) & rows for v in (t.after, t.base))
    return ratio(after, base, rows, f"images that ask for {_A[kind]}, erasing {t.concept!r} ({name})", seed)
