"""Measuring: from results to figures, nothing else. The same table gives the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation import metrics
from neuraleraser.evaluation.attack_metrics import AttackFigures, attack_figures
from neuraleraser.evaluation.damage_metrics import DAMAGE_METRICS, ClassDamage, LookAlikes, damage, lookalike_damage
from neuraleraser.evaluation.intervals import Estimate, proportion
from neuraleraser.evaluation.metrics import PairedResults, estimate_or_none, pair_with_base
from neuraleraser.evaluation.official_metrics import saeuron, unlearncanvas
from neuraleraser.evaluation.protocol import (
    ATTACK,
    FRAGMENTS,
    GRID,
    HELD_OUT,
    HELD_OUT_GRID,
    IMAGE_TO_IMAGE,
    MAIN_GROUPS,
    PROMPTS,
)
from neuraleraser.evaluation.results import BASE, UNHOOKED, Results
from neuraleraser.evaluation.route_metrics import RouteFigures, route_figures

GROUP_FIGURES: Mapping[str, tuple[str, Mapping[str, Callable[..., Estimate]]]] = {
    "held_out": (HELD_OUT, {"ua": metrics.ua, "kept_still": metrics.kept_still}),
    "image_to_image": (IMAGE_TO_IMAGE, {"ua": metrics.ua, "kept_still": metrics.kept_still}),
    "fragments": (FRAGMENTS, {"shown": metrics.shown_share, "ua": metrics.ua}),
}
"""Suffix of a name to the group of cells and the figures that are taken of it apart."""


@dataclass(frozen=True)
class Finding:
    """Something to know before the figures: of level "error" where the measurement itself is in doubt, else "note"."""

    level: str
    text: str


@dataclass(frozen=True)
class ErasureFigures:
    """The figures of one method on one concept, by name; None where there is nothing to compare with."""

    method: str
    concept: str
    kind: str
    figures: Mapping[str, Estimate | None]
    became: Sequence[tuple[str, Estimate]]
    route_figures: Sequence[RouteFigures] = ()
    damage: Sequence[ClassDamage] = ()
    lookalikes: LookAlikes | None = None
    attacks: Sequence[AttackFigures] = ()


@dataclass(frozen=True)
class Figures:
    """All that the results say: of the base, of each method and concept in the order they stand in, and findings."""

    base: Mapping[str, Estimate | None]
    erasures: Sequence[ErasureFigures]
    findings: Sequence[Finding]


def measure(results: Results) -> Figures:
    """Compute every figure of `results`. Raises DataError as `metrics.pair_with_base` does, or if there is no base."""
    names = zip(results.method, results.concept, strict=True)
    places = [place for place in dict.fromkeys(names) if place[0] not in (BASE, UNHOOKED)]
    pairs = [pair_with_base(results, method, concept) for method, concept in places]
    return Figures(
        base_figures(results),
        [_erasure_figures(t, results) for t in pairs],
        [f for t in pairs for f in _acted_unsaid(t)] + _unhooked_findings(results),
    )


def base_figures(results: Results) -> dict[str, Estimate | None]:
    """Return accuracies and artefact rate of the base on the grid, by class and in held-out phrasings too, and the
    share of unhooked images that are bit-identical. Raises DataError if there are no base images."""
    base = results.where(results.method == BASE)
    if not len(base):
        raise DataError(f"the results hold no images of {BASE!r}: draw them first")
    grid, held_out = (base.where(base.group == group) for group in (GRID, HELD_OUT_GRID))
    figures: dict[str, Estimate | None] = {}
    for kind in ("style", "object"):
        figures[f"{kind}_accuracy"] = _or_none(lambda kind=kind: metrics.accuracy(grid, kind))
        if len(held_out):
            figures[f"{kind}_accuracy_held_out"] = _or_none(lambda kind=kind: metrics.accuracy(held_out, kind))
    figures["artefact_rate"] = _or_none(lambda: metrics.artefact_rate(grid))
    unhooked = results.where(results.method == UNHOOKED)
    figures["unhooked_identical"] = _or_none(
        lambda: proportion(unhooked.identical, unhooked.compared, "images drawn with nothing attached", 0)
    )
    for kind in ("style", "object"):
        for name, figure in metrics.accuracy_by_class(grid, kind).items():
            figures[f"{kind}_accuracy_{name}"] = figure
    return figures


def _erasure_figures(t: PairedResults, results: Results) -> ErasureFigures:
    """Return all figures of one erasure: of the main groups, of each other group, the official ones, and of routes."""
    main = _rows_of_groups(t, *MAIN_GROUPS)
    figures = metrics.erasure_metrics(main)
    figures |= {name: estimate_or_none(metric, main) for name, metric in DAMAGE_METRICS.items()}
    figures["idle_identical"] = estimate_or_none(metrics.idle_identical, t)  # of all groups
    for suffix, (group, wanted) in GROUP_FIGURES.items():
        part = _rows_of_groups(t, group)
        if len(part):
            figures |= {f"{name}_{suffix}": estimate_or_none(metric, part) for name, metric in wanted.items()}
    for source, official in (("unlearncanvas", unlearncanvas), ("saeuron", saeuron)):
        answers = main.where(main.after.group != PROMPTS)  # a file's prompts are no answer set of styles and objects
        figures |= {f"{source}_{name}": value for name, value in official(answers).items()}
    try:
        became = metrics.became(main)
    except DataError:  # the base shows the concept nowhere
        became = []
    routes, lookalikes, attacks = route_figures(results, t), lookalike_damage(main), attack_figures(t)
    return ErasureFigures(t.method, t.concept, t.kind, figures, became, routes, damage(main), lookalikes, attacks)


def _acted_unsaid(t: PairedResults) -> list[Finding]:
    """Images that differ from base although the method said, before or while it was drawn, that it did not act; none of
    attacks, whose twins were drawn with another input."""
    t = t.where(np.array([not group.startswith(ATTACK) for group in t.after.group], dtype=bool))
    names, after = t.after.identities(), t.after
    denies = after.lists_name("watched", names) & ~after.lists_name("fired", names)
    rows = after.compared & (metrics.idle(t) | denies)
    wrong = rows & ~after.identical
    if not wrong.any():
        return []
    first = after.keys()[int(np.flatnonzero(wrong)[0])]
    text = (
        f"{t.method!r} of {t.concept!r} changed {wrong.sum()} of {rows.sum()} compared images in which it said that it "
        f"does not act, the first being {first.prompt!r} at seed {first.seed}: images that were not drawn again may "
        "differ, too"
    )
    return [Finding("error", text)]


def _unhooked_findings(results: Results) -> list[Finding]:
    """Return an error where base images differ from those drawn with nothing attached."""
    unhooked = results.where(results.method == UNHOOKED)
    wrong = int((~unhooked.identical).sum())
    if not wrong:
        return []
    text = (
        f"{wrong} of {len(unhooked)} base images differ from those drawn with nothing attached: methods that only "
        "watch change what they look at, so no figure here compares with the model itself"
    )
    return [Finding("error", text)]


def _rows_of_groups(t: PairedResults, *groups: str) -> PairedResults:
    """Return the pairs whose cells are of these groups."""
    return t.where(np.isin(t.after.group, groups))


def _or_none(metric: Callable[[], Estimate]) -> Estimate | None:
    try:
        return metric()
    except DataError:
        return None
