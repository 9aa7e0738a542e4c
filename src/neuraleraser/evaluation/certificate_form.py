"""The form of a certificate's content: what is there, once, and can be."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from neuraleraser.errors import FileError
from neuraleraser.evaluation.comparison import is_in_pictures
from neuraleraser.evaluation.results import BASE

_MAY_BE_NEGATIVE = ("kid", "lookalike_gap")
"""Figures that are no shares: an unbiased estimate of a distance, and a difference."""
_LONGEST = 300
"""Characters of a name, at most."""


def figure_key(figure: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the concept, the method and the name of a figure."""
    return str(figure["concept"]), str(figure["method"]), str(figure["figure"])


def is_whole(content: Mapping[str, Any]) -> bool:
    """Return True if everything is there that a certificate holds, once, in the form that it has there."""
    if content.keys() != {"certificate", "made", "run", "versions", "features", "figures", "rows"}:
        return False
    try:
        datetime.datetime.fromisoformat(content["made"])
        run, rows, figures = content["run"], content["rows"], content["figures"]
        names = [str(run["model"]), *run["methods"], *(name for place in places_of(run) for name in place)]
        keys = [value for concepts in run["methods"].values() for value in concepts.values()]
        places = [(*map(str, row[:3]), int(row[3]), str(row[4])) for row in rows]
        stated = [figure_key(f) for f in figures]
        fits = all(len(name) <= _LONGEST and name.isprintable() for name in names) and all(
            isinstance(key, str) for key in (*keys, *(row[5] for row in rows))
        )
        once = len(set(places)) == len(rows) and len(set(stated)) == len(figures)
        texts = all(isinstance(value, str) and len(value) <= _LONGEST for value in content["features"].values())
        return fits and once and texts and isinstance(content["versions"], dict) and all(map(_is_figure, figures))
    except (FileError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
        return False


def _is_figure(figure: Mapping[str, Any]) -> bool:
    numbers = [figure[name] for name in ("low", "high", "value", "n")]
    least = -math.inf if figure["figure"] in _MAY_BE_NEGATIVE else 0
    most = 100 if is_in_pictures(figure["figure"]) and figure["figure"] not in _MAY_BE_NEGATIVE else math.inf
    fits = all(type(x) in (int, float) and math.isfinite(x) for x in numbers) and type(numbers[3]) is int
    return fits and least <= numbers[0] <= numbers[1] <= most and least <= numbers[2] <= most and numbers[3] > 0


def places_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every method and concept of a run, the base first. Raises FileError for another record."""
    try:
        places = [(str(m), str(concept)) for m, concepts in record["methods"].items() for concept in concepts.keys()]
    except (KeyError, AttributeError) as error:
        raise FileError(f"the record of the run is damaged ({error!r}): evaluate again") from error
    return [(BASE, ""), *places]
