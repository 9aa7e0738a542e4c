"""The metrics: pure functions of the results, and the only place where they are defined.

One rule decides everything that a judge's numbers are read for:

- an image *shows* a class if the class's probability is above its threshold; else the class is *gone*;
- a class that the prompt asks for is *right* if the image shows it and it leads: with k classes of its domain asked
  for, fewer than k others have as much probability (a tie decides nothing, so with one asked for it is not right).

So what is right is shown, and what is gone is never right, for styles and objects alike. (Were a style right whenever
it leads, an image in which an erased style leads with less than its threshold would count as erased, and its style as
kept.) The threshold is the one at which the judge is most accurate on real renders, not one that suits a metric.

Further words
- *twin*: the base image of the same prompt, group and seed. Every metric of an erasure compares an image with its twin.
- *target cells*: the images whose prompt asks for the erased concept (as its style, or among its objects).

Cells with classes that the judge does not know are left out of accuracies. Every value is a ratio of two sums over
images, with an interval: see `intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation.intervals import Estimate, proportion, ratio
from neuraleraser.evaluation.results import BASE, Results

NO_CLASS = "nothing known"
"""Label in `became` of an image in which the judge sees no class at all."""


@dataclass(frozen=True, eq=False)
class PairedResults:
    """The images of one erasure beside their base twins: row i of `base` is the twin of row i of `after`."""

    method: str
    concept: str
    kind: str
    """Domain of the concept: "style" or "object"."""
    base: Results
    after: Results

    def __len__(self) -> int:
        return len(self.after)

    def where(self, rows: np.ndarray) -> PairedResults:
        """Return the pairs chosen by a boolean mask [n] or row numbers."""
        return PairedResults(self.method, self.concept, self.kind, self.base.where(rows), self.after.where(rows))


def pair_with_base(results: Results, method: str, concept: str) -> PairedResults:
    """Return the images that `method` made with `concept` erased, each with its base twin.

    Raises DataError if there are none, one has no twin, a twin was made for another cell, or the concept is not one of
    the judge's classes of its kind.
    """
    after = results.where((results.method == method) & (results.concept == concept))
    if not len(after):
        there = sorted(set(zip(results.method.tolist(), results.concept.tolist(), strict=True)))
        raise DataError(f"there are no results of method {method!r} on concept {concept!r}, only of {there}")
    kinds = sorted(set(after.kind))
    if len(kinds) > 1:
        raise DataError(f"concept {concept!r} of method {method!r} has the kinds {kinds}: expected one")
    names = results.judge.classes(kinds[0])
    if concept not in names:
        raise DataError(f"{concept!r} is not a {kinds[0]} that the judge knows: it knows {list(names)}")
    base = results.where(results.method == BASE)
    row_of = {key[2:]: row for row, key in enumerate(base.keys())}
    keys = [key[2:] for key in after.keys()]
    missing = [key for key in keys if key not in row_of]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} images of {method!r} on {concept!r} have no base twin, the first "
            f"being (prompt, seed, group) = {missing[0]}: add base results on the same prompts and seeds"
        )
    base = base.where(np.array([row_of[key] for key in keys]))
    for row, key in enumerate(keys):
        cells = [(t.cell_style[row], set(t.cell_objects[row])) for t in (base, after)]
        if cells[0] != cells[1]:
            raise DataError(f"the twins {key} were made for different cells, {cells[0]} and {cells[1]}")
    return PairedResults(method, concept, kinds[0], base, after)


# --- what each image shows: boolean arrays [n]


def is_target(results: Results, concept: str) -> np.ndarray:
    """Tell whether each image's prompt asks for `concept`: bool [n]."""
    asked = np.array([concept in objects for objects in results.cell_objects], dtype=bool)
    return asked | (results.cell_style == concept)


def shows_concept(results: Results, kind: str, concept: str) -> np.ndarray:
    """Tell whether each image shows `concept`, a class of `kind`: bool [n]."""
    names, values = _domain(results, kind)
    return (values > _thresholds(results, names))[:, names.index(concept)]


def classes_right(results: Results, kind: str) -> np.ndarray:
    """Tell of each class whether it is shown and among as many leading ones as are asked for: bool [n, classes].

    Only for the classes that the prompt asks for does that mean right.
    """
    names, values = _domain(results, kind)
    count = asked_classes(results, kind).sum(1)[:, None]
    ahead = [(values >= values[:, [i]]).sum(1) - 1 for i in range(len(names))]
    leads = np.stack(ahead, 1) < count if ahead else np.zeros_like(values, dtype=bool)
    return (values > _thresholds(results, names)) & leads


def all_classes_right(results: Results, kind: str) -> np.ndarray:
    """Tell whether every class of the domain that is asked for is right; False if none is: bool [n]."""
    asked = asked_classes(results, kind)
    return asked.any(axis=1) & np.all(classes_right(results, kind) | ~asked, axis=1)


# --- the metrics of one erasure


def ua(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share, of the images whose base twin shows the concept, of those that no longer do. The identity scores 0.

    All images of `t` count, whether or not their prompt asks for the concept. Raises DataError if no base image shows
    the concept.
    """
    shown = shows_concept(t.base, t.kind, t.concept)
    return proportion(
        ~shows_concept(t.after, t.kind, t.concept), shown, f"base images that show {t.concept!r} (ua)", seed
    )


def shown_share(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of base images that show the concept. Raises DataError if there are no images."""
    return proportion(shows_concept(t.base, t.kind, t.concept), np.ones(len(t), dtype=bool), "images (shown)", seed)


def ira(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Accuracy over the other concepts of the same domain, divided by the base's; target cells excluded.

    Raises DataError if there are no such cells, or the base is right in none of them.
    """
    return _accuracy_ratio(t, t.kind, ~is_target(t.after, t.concept), "ira", seed)


def cra(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Accuracy over the other domain, divided by the base's; target cells excluded. Raises DataError as `ira` does."""
    return _accuracy_ratio(t, _other_kind(t.kind), ~is_target(t.after, t.concept), "cra", seed)


def kept(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Other-domain accuracy on the target cells, divided by the base's: the cat that was drawn in the erased style is
    still a cat. Images that become right offset those that no longer are. Raises DataError as `ira` does.
    """
    return _accuracy_ratio(t, _other_kind(t.kind), is_target(t.after, t.concept), "kept", seed)


def kept_still(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share, of the target cells right in the other domain in the base, of those that still are: no gain offsets a
    loss. Raises DataError if there are none.
    """
    kind = _other_kind(t.kind)
    rows = is_target(t.after, t.concept) & _asks_for_known(t.base, kind) & all_classes_right(t.base, kind)
    return proportion(all_classes_right(t.after, kind), rows, f"base images with the right {kind} (kept_still)", seed)


def two_objects(t: PairedResults) -> np.ndarray:
    """Tell which images' prompts ask for two objects, the erased concept one of them: bool [n]."""
    pair = np.array([len(objects) == 2 for objects in t.after.cell_objects], dtype=bool)
    return pair & is_target(t.after, t.concept) & (t.kind == "object")


def bystander(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Accuracy of the object that stays in prompts with two, one of them erased, divided by the base's.

    Right means here: shown, and the erased concept aside no other object has as much probability. The concept is left
    out before erasure as after it, so that its going does not make the other one's place easier to hold; what takes
    its place must not lead.

    Raises DataError if the concept is no object, no prompt asks for it beside another, or the base shows none of those.
    """
    rows, after, base = _bystanders(t)
    return ratio(after & rows, base & rows, rows, f"prompts with {t.concept!r} and one more object (bystander)", seed)


def bystander_still(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share, of the objects beside the erased one that are right in the base, of those that still are. Raises DataError
    as `bystander` does.
    """
    rows, after, base = _bystanders(t)
    return proportion(after, rows & base, f"base images with the object beside {t.concept!r} (bystander_still)", seed)


def artefact_rate(results: Results, *, seed: int = 0) -> Estimate:
    """Share of images whose artefact distance is above the judge's threshold, which 99 % of held-out real renders stay
    below. Raises DataError if there are no images, or the judge measures no artefacts.
    """
    limit = results.judge.artefact_threshold
    if limit is None:
        raise DataError("the judge measures no artefacts: pass one that does, or leave artefact_rate out")
    return proportion(results.artefact > limit, np.ones(len(results), dtype=bool), "images (artefact_rate)", seed)


def artefact_rate_target(t: PairedResults, *, seed: int = 0) -> Estimate:
    """The artefact rate of the erased concept's own images: over all images, the many that are left alone would hide
    damage to the few that are edited. Raises DataError as `artefact_rate` does.
    """
    return artefact_rate(t.after.where(is_target(t.after, t.concept)), seed=seed)


def artefact_rate_target_base(t: PairedResults, *, seed: int = 0) -> Estimate:
    """The artefact rate of the base's images of the same cells. Raises DataError as `artefact_rate` does."""
    return artefact_rate(t.base.where(is_target(t.after, t.concept)), seed=seed)


def unchanged_share(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of images without the concept that are bit-identical to base.

    An image is without the concept when its prompt does not ask for it and its base twin does not show it. Those in
    which the method said that it would not act count as identical. Raises DataError if there are no such images.
    """
    without = _images_without(t)
    return proportion(t.after.identical, without, f"images without {t.concept!r} (unchanged_share)", seed)


def unchanged_compared(t: PairedResults, *, seed: int = 0) -> Estimate:
    """The same over those that were drawn with the method applied and compared. Images in which the method acts are all
    among them and the others a sample, so this is the lower of the two. Raises DataError if there are none.
    """
    rows = _images_without(t) & t.after.compared
    return proportion(t.after.identical, rows, f"compared images without {t.concept!r} (unchanged_compared)", seed)


def idle(t: PairedResults) -> np.ndarray:
    """Tell in which images the method said, of the base image, that it would not act: bool [n]."""
    names = t.after.identities()
    return t.base.lists_name("watched", names) & ~t.base.lists_name("fired", names)


def idle_identical(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of bit-identical images among those in which the method said that it would not act and which were drawn
    with it all the same: anything below 1 is a fault. Raises DataError if there are none.
    """
    return proportion(t.after.identical, idle(t) & t.after.compared, "compared idle images (idle_identical)", seed)


def became(t: PairedResults, *, seed: int = 0) -> list[tuple[str, Estimate]]:
    """Labels of what the judge sees where the concept was, as (label, share), largest first.

    The shares are of the images whose base twin shows the concept, and add up to 1. The label is the concept
    itself where it still shows (so its share is 1 - ua); else the most probable class of its domain among
    those that show and that the prompt does not ask for beside the concept; else `NO_CLASS`.

    Raises DataError if no base image shows the concept.
    """
    there = shows_concept(t.base, t.kind, t.concept)
    after = t.after.where(there)
    names, values = _domain(after, t.kind)
    values = np.where(values > _thresholds(after, names), values, -1.0)
    if t.kind == "object":
        values = np.where(asked_classes(after, "object"), -1.0, values)
    best = values.argmax(axis=1)
    labels = np.array([*names, NO_CLASS], dtype=object)[np.where(values.max(axis=1) < 0, len(names), best)]
    labels[shows_concept(after, t.kind, t.concept)] = t.concept
    everything = np.ones(len(after), dtype=bool)
    what = f"base images that show {t.concept!r} (became)"
    seen = sorted(set(labels)) or [NO_CLASS]
    ranking = [(label, proportion(labels == label, everything, what, seed)) for label in seen]
    return sorted(ranking, key=lambda item: (-item[1].value, item[0]))


METRICS: Mapping[str, Callable[..., Estimate]] = {
    "ua": ua,
    "ira": ira,
    "cra": cra,
    "kept": kept,
    "kept_still": kept_still,
    "bystander": bystander,
    "bystander_still": bystander_still,
    "artefact_rate_target": artefact_rate_target,
    "artefact_rate_target_base": artefact_rate_target_base,
    "artefact_rate": lambda t, seed=0: artefact_rate(t.after, seed=seed),
    "unchanged_share": unchanged_share,
    "unchanged_compared": unchanged_compared,
    "idle_identical": idle_identical,
}
"""The metrics of one erasure by name."""


def erasure_metrics(t: PairedResults, *, seed: int = 0) -> dict[str, Estimate | None]:
    """Return all metrics of one erasure by name; None where there is nothing to compare with: no prompt has the concept
    beside another, the base is right in none of a few cells, the judge measures no artefacts or knows one domain only.
    """
    return {name: estimate_or_none(metric, t, seed) for name, metric in METRICS.items()}


def estimate_or_none(metric: Callable[..., Estimate], t: PairedResults, seed: int = 0) -> Estimate | None:
    """Return the metric, or None if there is nothing to compare with: one empty ratio must not cost the others."""
    try:
        return metric(t, seed=seed)
    except DataError:
        return None


# --- the metrics of one set of images


def accuracy(results: Results, kind: str, *, seed: int = 0) -> Estimate:
    """Share of right images among those that ask for a style (kind "style") or for objects (kind "object") that the
    judge knows. Raises DataError if no image asks for one.
    """
    return proportion(
        all_classes_right(results, kind),
        _asks_for_known(results, kind),
        f"images that ask for {_WITH_ARTICLE[kind]}",
        seed,
    )


def accuracy_by_class(results: Results, kind: str, *, seed: int = 0) -> dict[str, Estimate]:
    """Share of right images of each class that any prompt asks for.

    Beside a second object, an object is judged alone here; `accuracy` wants both.
    """
    good, asked = classes_right(results, kind), asked_classes(results, kind)
    return {
        name: proportion(good[:, i], asked[:, i], f"images that ask for {name!r}", seed)
        for i, name in enumerate(results.judge.classes(kind))
        if asked[:, i].any()
    }


# --- shared pieces


_WITH_ARTICLE = {"style": "a style", "object": "an object"}


def _other_kind(kind: str) -> str:
    """Return "object" for "style", and "style" for "object"."""
    return "object" if kind == "style" else "style"


def _domain(results: Results, kind: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and probabilities [n, classes] of one domain."""
    return results.judge.classes(kind), results.p_style if kind == "style" else results.p_object


def _thresholds(results: Results, names: tuple[str, ...]) -> np.ndarray:
    """The threshold of each of `names`: [classes] float32."""
    return np.array([results.judge.thresholds[name] for name in names], dtype=np.float32)


def asked_classes(results: Results, kind: str) -> np.ndarray:
    """Classes that each prompt asks for: bool [n, classes]."""
    asked = [(style,) for style in results.cell_style] if kind == "style" else results.cell_objects
    names = results.judge.classes(kind)
    return np.array([[name in some for name in names] for some in asked], dtype=bool).reshape(len(results), len(names))


def _asks_for_known(results: Results, kind: str) -> np.ndarray:
    """Tell whether the prompt asks for something of the domain, all of which the judge knows: bool [n]."""
    asked = [(style,) if style else () for style in results.cell_style] if kind == "style" else results.cell_objects
    names = set(results.judge.classes(kind))
    return np.array([bool(some) and names.issuperset(some) for some in asked], dtype=bool)


def _images_without(t: PairedResults) -> np.ndarray:
    """Tell which images neither ask for the concept nor show it in the base: bool [n]."""
    return ~is_target(t.after, t.concept) & ~shows_concept(t.base, t.kind, t.concept)


def _bystanders(t: PairedResults) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> images with two objects, one of them erased; whether the other is right after, and in the base: bool [n]."""

    def other_is_right(results: Results) -> np.ndarray:
        names, values = _domain(results, "object")
        stays = asked_classes(results, "object") & (np.array(names) != t.concept)
        values = np.where(np.array(names) == t.concept, -1, values)
        own = np.where(stays, values, -1).max(axis=1, initial=-1)
        others = np.where(stays, -1, values).max(axis=1, initial=-1)
        return ((values > _thresholds(results, names)) & stays).any(axis=1) & (own > others)

    return two_objects(t), other_is_right(t.after), other_is_right(t.base)


def _accuracy_ratio(t: PairedResults, kind: str, rows: np.ndarray, name: str, seed: int) -> Estimate:
    rows = rows & _asks_for_known(t.after, kind)
    after, base = (all_classes_right(results, kind) & rows for results in (t.after, t.base))
    return ratio(after, base, rows, f"images that ask for {_WITH_ARTICLE[kind]}, erasing {t.concept!r} ({name})", seed)
