"""The report: metrics with intervals, pictures, settings and versions, as plain data.

`Report.save_json` writes `report.json`, `page.save_html` a self-contained page with the same figures and
the pictures, `terminal_table` the figures for a console. Nothing here computes a metric.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuraleraser.bench.files import write_bytes
from neuraleraser.bench.measure import Measure
from neuraleraser.errors import DataError

METRICS = ("ua", "ira", "cra", "kept", "bystander", "artefact_rate", "unchanged_share")
COSTS = ("make_seconds", "bytes", "overhead")
BASE_METRICS = ("style_accuracy", "object_accuracy", "artefact_rate")
JUDGE_METRICS = ("style_accuracy", "object_accuracy")

Number = Measure | float | None


@dataclass(frozen=True, eq=False)
class Pair:
    """An image before and after erasure, at the same prompt and seed."""

    prompt: str
    seed: int
    before: np.ndarray
    """[height, width, 3] uint8"""
    after: np.ndarray
    """[height, width, 3] uint8"""

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            check_image(getattr(self, name), f"the image {name!r} of {self.prompt!r} at seed {self.seed}")
        if self.before.shape != self.after.shape:
            raise DataError(
                f"{self.prompt!r} at seed {self.seed}: before and after have the shapes "
                f"{self.before.shape} and {self.after.shape}; expected the same."
            )

    @property
    def identical(self) -> bool:
        """Whether both have the same bits."""
        return bool(np.array_equal(self.before, self.after))


@dataclass(frozen=True, eq=False)
class FeaturePanel:
    """One feature of an eraser, with pictures of where it fires."""

    label: str
    note: str = ""
    heatmaps: Sequence[tuple[str, np.ndarray]] = ()
    """(caption, [height, width, 3] uint8)"""

    def __post_init__(self) -> None:
        for caption, image in self.heatmaps:
            check_image(image, f"the heatmap {caption!r} of feature {self.label!r}")


@dataclass(frozen=True, eq=False)
class ConceptSection:
    """One erased concept: its figures and its pictures."""

    name: str
    kind: str
    """"style" or "object"."""
    metrics: Mapping[str, Number]
    """What `metrics.erasure` returns, with make_seconds, bytes and overhead (ratio to plain sampling) added.
    Further entries are passed on to report.json. None stands for what does not apply, or has
    no base to compare with."""
    pairs: Sequence[Pair] = ()
    """Images of the concept."""
    features: Sequence[FeaturePanel] = ()
    became: Sequence[tuple[str, Measure | float]] = ()
    """(label, share), largest first."""
    others: Sequence[Pair] = ()
    """Images of other concepts, which should not change."""
    method: str = "eraser"


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that one run of `demo` or `evaluate` found out."""

    base: Mapping[str, Number]
    """What `metrics.base_quality` returns."""
    judge: Mapping[str, Number]
    """style_accuracy and object_accuracy on held-out renders."""
    concepts: Sequence[ConceptSection]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    title: str = "Concepts erased"
    intro: str = ""
    """One paragraph for the page; a general one stands there if empty."""

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: plain data, rates as fractions of 1, no NaN.

        Raises:
            DataError: a figure is missing or not finite, or a concept stands there twice for one method.
        """
        seen: set[tuple[str, str]] = set()
        for section in self.concepts:
            if (section.method, section.name) in seen:
                raise DataError(f"Concept {section.name!r} of method {section.method!r} is in the report twice.")
            seen.add((section.method, section.name))
        return {
            "base": _figures(self.base, BASE_METRICS, "base"),
            "judge": _figures(self.judge, JUDGE_METRICS, "judge"),
            "concepts": [_concept(section) for section in self.concepts],
            "settings": _plain(self.settings, "settings"),
            "versions": _plain(self.versions, "versions"),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write report.json atomically. Raises DataError as `to_dict` does, FileError if it cannot write."""
        write_bytes(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def terminal_table(concepts: Sequence[ConceptSection]) -> str:
    """The figures as plain text of at most 120 columns: a line of values and one of intervals a concept."""
    heads = (
        "concept",
        "n",
        "ua",
        "ira",
        "cra",
        "kept",
        "bystander",
        "artefacts",
        "unchanged",
        "make",
        "size",
        "cost",
    )
    rows: list[tuple[str, ...]] = []
    for section in concepts:
        figures = [section.metrics.get(name) for name in METRICS]
        seconds, size, overhead = (value_of(section.metrics.get(name)) for name in COSTS)
        count = section.metrics.get("ua")
        rows.append(
            (
                _short(section.name, 18),
                str(count.n) if isinstance(count, Measure) else "",
                *("-" if value_of(figure) is None else f"{value_of(figure):.2f}" for figure in figures),
                "-" if seconds is None else f"{seconds:.0f} s",
                "-" if size is None else size_text(size),
                "-" if overhead is None else f"x{overhead:.2f}",
            )
        )
        ends = [f"{f.low:.2f}-{f.high:.2f}" if isinstance(f, Measure) else "" for f in figures]
        rows.append((_short(f"  {section.kind}, {section.method}", 18), "", *ends, "", "", ""))
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    widths = [width if i != 0 else min(width, 18) for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return " ".join([first, *rest]).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, rows)])


def check_image(image: Any, what: str) -> None:
    """Raises DataError unless `image` is [height, width, 3] uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{what[0].upper()}{what[1:]} is {got}; expected a uint8 array [height, width, 3].")
    if not image.size:
        raise DataError(f"{what[0].upper()}{what[1:]} has shape {image.shape}, which holds no pixels.")


def value_of(figure: Number) -> float | None:
    """The number itself, without its interval."""
    return figure.value if isinstance(figure, Measure) else figure


def size_text(size: float) -> str:
    """Bytes as a reader says them: "812 B", "48 kB", "1.2 MB"."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale * 0.9995:
            return f"{size / scale:.1f} {unit}" if size < 10 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _concept(section: ConceptSection) -> dict[str, Any]:
    where = f"concept {section.name!r}"
    if section.kind not in ("style", "object"):
        raise DataError(f"{where} has the kind {section.kind!r}; expected 'style' or 'object'.")
    # Ratios to the base, which a weak base leaves empty.
    ratios = ("ua", "ira", "cra", "kept", "bystander")
    required = tuple(name for name in METRICS + COSTS if name not in ratios)
    figures = _figures({**dict.fromkeys(ratios), **section.metrics}, required, where)
    count = section.metrics.get("ua")
    shares = [
        {"label": label, **_figures({"share": share}, ("share",), f"{where}, became {label!r}")}
        for label, share in section.became
    ]
    return {
        "method": section.method,
        "name": section.name,
        "kind": section.kind,
        "n": count.n if isinstance(count, Measure) else None,
        **{name: figures.pop(name) for name in METRICS + COSTS},
        **figures,
        "became": shares,
    }


def _figures(figures: Mapping[str, Number], required: Sequence[str], where: str) -> dict[str, Any]:
    """{name: value, ..., "ci": {name: [low, high]}, "ns": {name: images}}, every number finite."""
    missing = [name for name in required if figures.get(name) is None]
    if missing:
        raise DataError(f"The report's {where} has no {', '.join(missing)}; it needs {', '.join(required)}.")
    values = {name: _plain(value_of(figure), f"{where}.{name}") for name, figure in figures.items()}
    measures = {name: figure for name, figure in figures.items() if isinstance(figure, Measure)}
    ci = {name: _plain([m.low, m.high], f"{where}.ci.{name}") for name, m in measures.items()}
    return values | {"ci": ci, "ns": {name: m.n for name, m in measures.items()}}


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON knows it. Raises DataError for NaN and infinity, and for what is no plain data."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"The report's {where} is {value}; expected a finite number, so look at what computed it.")
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    raise DataError(f"The report's {where} is a {type(value).__name__}; expected numbers, text, lists or mappings.")
