"""Reporting: figures with intervals, pictures, findings, settings and versions, as plain data.

`report` puts it together, `Report.save_json` writes report.json, `html.save_html` a self-contained page with the same
figures and the pictures, `terminal.terminal_tables` the figures for a console. Nothing here computes a metric.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation.attack_metrics import AttackFigures
from neuraleraser.evaluation.clip_scores import ClipScores
from neuraleraser.evaluation.damage_metrics import ClassDamage, LookAlikes
from neuraleraser.evaluation.detections import DetectionCounts
from neuraleraser.evaluation.feature_distances import FeatureDistance
from neuraleraser.evaluation.figures import GatePanel, ImagePair, spaced_sample
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.measure import ErasureFigures, Figures, Finding
from neuraleraser.evaluation.metrics import pair_with_base, shows_concept
from neuraleraser.evaluation.protocol import EMPTY, GRID, MAIN_GROUPS, Cell, EvaluationProtocol
from neuraleraser.evaluation.results import Results
from neuraleraser.evaluation.route_metrics import RouteFigures
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.versions import versions
from neuraleraser.io.atomic import write_bytes
from neuraleraser.judges import Judge
from neuraleraser.settings import EvaluateSettings
from neuraleraser.sites.routes import NAMED

Number = Estimate | float | None
TARGET_PAIRS, STARTED_PAIRS, OTHER_PAIRS = 6, 3, 8
"""Images that name the concept, that start from a picture of it, and of others, that a report shows of a method."""
BESIDE_TARGET, BESIDE_OTHER = 3, 1
"""Images that name the concept, and of others, that a report shows of every method, at equal prompts and seeds."""


@dataclass(frozen=True, eq=False)
class ErasureReport:
    """One method on one concept: its figures and its images.

    Examples:
        >>> entry = report.of("none", "Van_Gogh")
        >>> entry.kind, entry.figures["ua"].value
        ('style', 0.0)
    """

    method: str
    concept: str
    kind: str
    """"style" or "object"."""
    figures: Mapping[str, Number]
    """Those of `measure`, and costs: make_seconds, make_peak_bytes, bytes, overhead and overhead_idle (sampling time
    over plain sampling). None where there is nothing to compare with."""
    became: Sequence[tuple[str, Estimate]] = ()
    """(label, share), largest first."""
    pairs: Sequence[ImagePair] = ()
    """Images of the concept."""
    started: Sequence[ImagePair] = ()
    """Images that start from a picture of the concept, with an empty prompt."""
    others: Sequence[ImagePair] = ()
    """Images of other concepts, which should not change."""
    beside: Sequence[ImagePair] = ()
    """Images at the prompts and seeds at which all methods of the concept are shown; () if there is one method."""
    gates: Sequence[GatePanel] = ()
    """Gates of an eraser, with what they read."""
    routes: str = ""
    """Routes that an eraser sees and does not see, in words."""
    route_figures: Sequence[RouteFigures] = ()
    """Figures of images that start from a picture of the concept, or hold embeddings that were learned for it."""
    damage: Sequence[ClassDamage] = ()
    """Of every other style and object, the share that is still right."""
    lookalikes: LookAlikes | None = None
    """Classes that look like the concept, and how much more they lose than the rest of its domain."""
    attacks: Sequence[AttackFigures] = ()
    """Attacks through the method, which an audit runs."""
    distance: FeatureDistance | None = None
    """Distances of its images without the concept from the base model's; None without features to take them in."""
    clip: ClipScores | None = None
    """CLIP scores before and after; None where no CLIP was given."""
    detections: DetectionCounts | None = None
    """Detections before and after; None from a judge that does not count."""


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that one evaluation found out.

    Examples:
        >>> [(entry.method, entry.concept) for entry in report.erasures]
        [('neuraleraser', 'Van_Gogh'), ('none', 'Van_Gogh')]
        >>> report.save_json("report.json")
        >>> report.of("none", "Van_Gogh").figures["unchanged_share"].value
        1.0
    """

    base: Mapping[str, Estimate | None]
    """The figures of `measure.base_figures`."""
    judge: Mapping[str, Any]
    """Its classes, thresholds and accuracy, as plain data."""
    erasures: Sequence[ErasureReport]
    """A concept's own method first, its controls below."""
    findings: Sequence[Finding] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    title: str = "Concepts erased"
    intro: str = ""
    """One paragraph for the page; a general one stands there if empty."""

    def of(self, method: str, concept: str) -> ErasureReport:
        """Return the entry of a method and concept.

        Args:
            method: Name of the method.
            concept: Name of the concept.

        Returns:
            The entry.

        Raises:
            DataError: There is none.
        """
        for entry in self.erasures:
            if (entry.method, entry.concept) == (method, concept):
                return entry
        raise DataError(f"the report has no method {method!r} on {concept!r}")

    def with_details(
        self, method: str, concept: str, costs: Mapping[str, float], gates: Sequence[GatePanel] = (), routes: str = ""
    ) -> Report:
        """Return the report with costs, gates and routes added to one entry.

        Args:
            method: Name of the method.
            concept: Name of the concept.
            costs: Costs by name.
            gates: Panels of its gates.
            routes: Routes that it sees and does not see, in words.

        Returns:
            A new report.

        Raises:
            DataError: There is no entry of the method and concept.
        """
        found = self.of(method, concept)
        changed = replace(found, figures={**found.figures, **costs}, gates=gates, routes=routes)
        return replace(self, erasures=[changed if entry is found else entry for entry in self.erasures])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json: plain data, rates as fractions of 1, no NaN.

        Returns:
            The content.

        Raises:
            DataError: A figure is not finite, or a method stands there twice for one concept.
        """
        seen: set[tuple[str, str]] = set()
        for entry in self.erasures:
            if (entry.method, entry.concept) in seen:
                raise DataError(f"method {entry.method!r} on {entry.concept!r} is in the report twice: expected once")
            seen.add((entry.method, entry.concept))
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "base": _figures(self.base, "base"),
            "judge": _to_json(self.judge, "judge"),
            "concepts": [_entry_json(entry) for entry in self.erasures],
            "settings": _to_json(self.settings, "settings"),
            "versions": _to_json(self.versions, "versions"),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write report.json atomically.

        Args:
            path: The file.

        Raises:
            DataError: As for `to_dict`.
            FileError: The file cannot be written.
        """
        write_bytes(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class InPictures:
    """Measurements that results do not hold, as they are of the pictures themselves, by method and concept."""

    distances: Mapping[tuple[str, str], FeatureDistance]
    clip: Mapping[tuple[str, str], ClipScores]
    detections: Mapping[tuple[str, str], DetectionCounts]


def report(
    figures: Figures,
    results: Results,
    run: RunFolder,
    protocol: EvaluationProtocol,
    judge: Judge,
    settings: EvaluateSettings,
    pipe: Any,
    in_pictures: InPictures,
) -> Report:
    """Put the report together. All pictures are shown of the first method of each concept, as those below it are
    controls; a few are shown of every method, side by side."""
    concepts = [e.concept for e in figures.erasures]
    entries = []
    for i, e in enumerate(figures.erasures):
        entry = ErasureReport(
            e.method,
            e.concept,
            e.kind,
            e.figures,
            e.became,
            route_figures=e.route_figures,
            attacks=e.attacks,
            damage=e.damage,
            lookalikes=e.lookalikes,
            distance=in_pictures.distances.get((e.method, e.concept)),
            clip=in_pictures.clip.get((e.method, e.concept)),
            detections=in_pictures.detections.get((e.method, e.concept)),
        )
        pictures = _Pictures(e, results, run, protocol)
        if e.concept not in concepts[:i]:
            entry = pictures.added_to(entry)
        if concepts.count(e.concept) > 1:
            entry = replace(entry, beside=pictures.beside())
        entries.append(entry)
    spec = run.judge
    return Report(
        base=figures.base,
        judge={
            "name": type(judge).__name__,
            "styles": len(spec.styles),
            "objects": len(spec.objects),
            "figures": dict(judge.figures),
            "thresholds": dict(spec.thresholds),
            "artefact_threshold": spec.artefact_threshold,
        },
        erasures=entries,
        findings=figures.findings,
        settings=asdict(settings)
        | ({"protocol": protocol.name} if protocol.name else {})
        | {"images in all": len(results), "images drawn": _count_images(results)},
        versions=versions(pipe),
    )


def _count_images(results: Results) -> int:
    """Return how many images were generated: rows of images that were left alone have none."""
    return int(((results.method == "base") | results.compared).sum())


class _Pictures:
    """Pairs of images of one method and concept, in its run's folder."""

    def __init__(self, e: ErasureFigures, results: Results, run: RunFolder, protocol: EvaluationProtocol) -> None:
        t = pair_with_base(results, e.method, e.concept)
        shown = {key[2:] for key in t.after.where(shows_concept(t.base, e.kind, e.concept)).keys()}
        cells = protocol.cells[e.concept]
        self._run, self._place = run, (e.method, e.concept)
        self._target = [c for c in cells if c.key in shown and c.group in MAIN_GROUPS and c.asks_for(e.concept)]
        self._started = [c for c in cells if c.key in shown and c.group == EMPTY]
        self._others = [c for c in cells if c.group == GRID and not c.asks_for(e.concept)]

    def added_to(self, entry: ErasureReport) -> ErasureReport:
        """Return the entry with pairs of images that show the concept, and pairs that do not."""
        return replace(
            entry,
            pairs=self._pairs(self._target, TARGET_PAIRS),
            started=self._pairs(self._started, STARTED_PAIRS),
            others=self._pairs(self._others, OTHER_PAIRS),
        )

    def beside(self) -> list[ImagePair]:
        """Return pairs at prompts and seeds that the concept and the base alone decide."""
        return self._pairs(self._target, BESIDE_TARGET) + self._pairs(self._others, BESIDE_OTHER)

    def _pairs(self, some: Sequence[Cell], count: int) -> list[ImagePair]:
        return [
            ImagePair(
                c.prompt,
                c.seed,
                self._run.image("base", "", c),
                self._run.image(*self._place, c),
                "" if c.route == NAMED else c.route,
            )
            for c in dict.fromkeys(spaced_sample(some, count))
        ]


def value_of(figure: Number) -> float | None:
    """Return the number itself, without its interval."""
    return figure.value if isinstance(figure, Estimate) else figure


def size_text(size: float) -> str:
    """Return bytes as a reader says them: "812 B", "48 kB", "1.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale * 0.9995:
            return f"{size / scale:.1f} {unit}" if size < 10 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def _entry_json(entry: ErasureReport) -> dict[str, Any]:
    """Return an entry as JSON. Raises DataError for a value that JSON has not."""
    where = f"{entry.method!r} on {entry.concept!r}"
    if entry.kind not in ("style", "object"):
        raise DataError(f"{where} has the kind {entry.kind!r}: expected 'style' or 'object'")
    shares = [
        {"label": label, **_figures({"share": share}, f"{where}, became {label!r}")} for label, share in entry.became
    ]
    routes = [
        {"group": r.group, "strength": r.strength, **_figures(r.figures, f"{where}, {r.group!r} at {r.strength:g}")}
        for r in entry.route_figures
    ]
    count = entry.figures.get("ua")
    return {
        "method": entry.method,
        "name": entry.concept,
        "kind": entry.kind,
        "n": count.n if isinstance(count, Estimate) else None,
        **_figures(entry.figures, where),
        "became": shares,
        "route_figures": routes,
        "attacks": [
            {"attack": a.attack, "budget": a.budget, **_figures(a.figures, f"{where}, {a.group!r}")}
            for a in entry.attacks
        ],
        "damage": [
            {"name": d.name, "kind": d.kind, **_figures({"still_right": d.still_right}, f"{where}, {d.name!r}")}
            for d in entry.damage
        ],
        "distance": None if entry.distance is None else _figures(vars(entry.distance), f"{where}, distance"),
        "clip": None if entry.clip is None else _figures(vars(entry.clip), f"{where}, CLIP scores"),
        "lookalikes": None if entry.lookalikes is None else _lookalikes_json(entry.lookalikes, where),
        "detections": None if entry.detections is None else _detections_json(entry.detections),
    }


def _detections_json(found: DetectionCounts) -> dict[str, Any]:
    rows = [{"name": name, "base": base, "after": after} for name, base, after in found.rows()]
    return {
        "images": found.images,
        "classes": rows[:-1],
        "total": {"base": rows[-1]["base"], "after": rows[-1]["after"]},
    }


def _lookalikes_json(found: LookAlikes, where: str) -> dict[str, Any]:
    names = [{"name": name, "probability": _to_json(p, f"{where}, {name!r}")} for name, p in found.names]
    return {"names": names, **_figures({"gap": found.gap}, f"{where}, look-alikes")}


def _figures(figures: Mapping[str, Number], where: str) -> dict[str, Any]:
    """{name: value, ..., "ci": {name: [low, high]}, "ns": {name: images}}, every number finite."""
    values = {name: _to_json(value_of(figure), f"{where}.{name}") for name, figure in figures.items()}
    estimates = {name: figure for name, figure in figures.items() if isinstance(figure, Estimate)}
    ci = {name: _to_json([m.low, m.high], f"{where}.ci.{name}") for name, m in estimates.items()}
    return values | {"ci": ci, "ns": {name: m.n for name, m in estimates.items()}}


def _to_json(value: Any, where: str) -> Any:
    """Return `value` as JSON knows it. Raises DataError for NaN and infinity, and for what is no plain data."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"the report's {where} is {value}: expected a finite number, so look at what computed it")
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(items)]
    raise DataError(f"the report's {where} is a {type(value).__name__}: expected numbers, text, lists or mappings")
