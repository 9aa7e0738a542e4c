"""Two reports side by side: figures that both have, and those that differ by more than their intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from neuraleraser.errors import FileError
from neuraleraser.evaluation.clip_scores import ClipScores
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.protocol import ATTACK
from neuraleraser.io.names import printable
from neuraleraser.io.reading import parse_json, read_bytes

MAX_REPORT_BYTES = 64 * 2**20
"""Bytes of a report.json, at most."""

Key = tuple[str, str, str]
"""Concept, method and figure; of a route "group strength: figure", of an attack "group: figure"."""
KID, CLIP_SCORES = "kid", tuple(f"clip_score_{field.name}" for field in fields(ClipScores))


def is_in_pictures(figure: str) -> bool:
    """Return True for the name of a figure that is of the pictures themselves, which rows of results do not give."""
    return figure == KID or figure in CLIP_SCORES


@dataclass(frozen=True)
class Difference:
    """One figure in two reports.

    Examples:
        >>> from neuraleraser.evaluation.comparison import Difference
        >>> from neuraleraser.evaluation.intervals import Estimate
        >>> a, b = Estimate(1.0, 40, 0.91, 1.0), Estimate(0.5, 40, 0.35, 0.65)
        >>> Difference("Van_Gogh", "none", "ua", a, b).apart
        True
    """

    concept: str
    method: str
    figure: str
    first: Estimate
    second: Estimate

    @property
    def apart(self) -> bool:
        """True if the two 95 % intervals do not meet, as by chance alone they do in some 0.6 % of figures."""
        return self.first.high < self.second.low or self.second.high < self.first.low


@dataclass(frozen=True)
class Comparison:
    """Two reports.

    Attributes:
        differences: Figures that both have, but KID and CLIP scores that were measured in other features.
        only_first: Figures that the first alone has.
        only_second: Figures that the second alone has.
        settings: Settings that differ, with their values in both.

    Examples:
        >>> report.save_json("report.json")
        >>> compare_reports("report.json", "report.json").settings
        {}
    """

    differences: tuple[Difference, ...]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    settings: Mapping[str, tuple[Any, Any]]


def compare_reports(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """Compare two report.json files.

    Args:
        first: The one file.
        second: The other.

    Returns:
        The comparison.

    Raises:
        FileError: A file is missing, or no report.

    Examples:
        >>> report.save_json("report.json")
        >>> found = compare_reports("report.json", "report.json")
        >>> any(d.apart for d in found.differences), found.only_first, found.settings
        (False, (), {})
    """
    a, b = _read(first), _read(second)
    mine, theirs = estimates_of(first, a), estimates_of(second, b)
    spaces = tuple(_spaces(report.get("judge")) for report in (a, b))
    unlike = [kind for kind in spaces[0] if spaces[0][kind] != spaces[1][kind]]
    alike = [key for key in mine if key in theirs and _space_of(key[2]) not in unlike]
    both = tuple(Difference(*key, mine[key], theirs[key]) for key in alike)
    measured_in = tuple({kind: of[kind] for kind in unlike} for of in spaces)
    settings = a.get("settings", {}) | measured_in[0], b.get("settings", {}) | measured_in[1]
    names = [name for name in {**settings[0], **settings[1]} if settings[0].get(name) != settings[1].get(name)]
    return Comparison(
        both,
        tuple(key for key in mine if key not in theirs),
        tuple(key for key in theirs if key not in mine),
        {name: (settings[0].get(name), settings[1].get(name)) for name in names},
    )


def _spaces(judge: Any) -> dict[str, Any]:
    """Return what a report's KID and its CLIP scores are measured in: neither compares with that of another model."""
    judge = judge if isinstance(judge, dict) else {}
    clip, features = judge.get("clip_digest"), judge.get("features")
    return {"features of KID": clip if clip and features == judge.get("clip") else features, "CLIP": clip}


def _space_of(figure: str) -> str:
    return "features of KID" if figure == KID else "CLIP" if figure in CLIP_SCORES else ""


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a report's content. Raises FileError for anything else."""
    try:
        data = parse_json(read_bytes(path, MAX_REPORT_BYTES))
    except ValueError as error:
        raise FileError(f"{path} is no JSON ({error}): pass a report.json that evaluate or demo wrote") from error
    fits = isinstance(data, dict) and isinstance(data.get("concepts"), list)
    if not fits or not isinstance(data.get("settings", {}), dict):
        raise FileError(f"{path} is no report: pass a report.json that evaluate or demo wrote")
    return data


def estimates_of(path: str | os.PathLike[str], data: dict[str, Any]) -> dict[Key, Estimate]:
    """Return every figure of a report that has an interval, by concept, method and name; FID has none.

    Raises FileError, with the report's path, for a report that is damaged.
    """
    found: dict[Key, Estimate] = {}

    def put(key: Key, entry: Mapping[str, Any], name: str) -> None:
        if key in found:
            raise ValueError(f"{', '.join(key)} stands there twice")
        found[key] = _estimate(entry, name)

    try:
        for entry in data["concepts"]:
            where = str(entry["name"]), str(entry["method"])
            for name in entry["ci"]:
                put((*where, name), entry, name)
            for route in entry.get("route_figures", ()):
                group = f"{route['group']} {route['strength']:.1f}"
                for name in route["ci"]:
                    put((*where, f"{group}: {name}"), route, name)
            for attack in entry.get("attacks", ()):
                for name in attack["ci"]:
                    put((*where, f"{ATTACK}{attack['attack']}: {name}"), attack, name)
            for damage in entry.get("damage", ()):
                put((*where, f"still_right_{damage['name']}"), damage, "still_right")
            for part, prefix in (("lookalikes", "lookalike_"), ("distance", ""), ("clip", "clip_score_")):
                for name in (entry.get(part) or {"ci": ()})["ci"]:
                    put((*where, f"{prefix}{name}"), entry[part], name)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(
            f"{path} is a damaged report ({printable(error, 200)}): pass one that evaluate or demo wrote"
        ) from error
    return found


def _estimate(entry: Mapping[str, Any], name: str) -> Estimate:
    (low, high), value, n = entry["ci"][name], entry[name], entry["ns"][name]
    if any(type(x) not in (int, float) for x in (value, low, high)) or type(n) is not int or not low <= high:
        raise ValueError(f"{name} is {value!r} in {low!r} to {high!r}")
    numbers = [float(x) for x in (value, low, high)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {value!r}")
    return Estimate(numbers[0], n, numbers[1], numbers[2])
