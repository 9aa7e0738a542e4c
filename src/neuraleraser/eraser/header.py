"""Checks of an eraser's header: the fields that the package reads, each of its kind and within bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neuraleraser.concepts import KINDS
from neuraleraser.io.names import name_error, printable, prompt_error
from neuraleraser.settings import MAX_SEED
from neuraleraser.sites import ROUTES

_MAX_PROMPTS = 100_000
_MAX_WEIGHT = 1e38  # no float32 is larger, and sums of these stay finite in float64


def header_error(header: Mapping[str, Any]) -> str | None:
    """Say which field of an eraser's header is missing or cannot be what it says, or None.

    Fields that the package does not read may hold any JSON. A file may be a stranger's: the name is printed, prompts
    are drawn, seeds are compared, and `made_for` is compared with a model's weights.
    """
    if error := name_error(header.get("concept")):
        return f"field concept: {error}"
    for field, fits in _FIELDS.items():
        if field in header and not fits(header[field]):
            return f"field {field} is {printable(header[field])}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and -_MAX_WEIGHT <= value <= _MAX_WEIGHT and math.isfinite(value)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and value.isprintable()


def _are_prompts(value: Any) -> bool:
    texts = isinstance(value, list) and len(value) <= _MAX_PROMPTS
    return texts and all(isinstance(prompt, str) and prompt_error(prompt) is None for prompt in value)


def _are_seeds(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(_is_whole(seed) for seed in value)
    return pair and 0 <= value[0] <= value[1] <= MAX_SEED


def _is_model(value: Any) -> bool:
    """True for what `sites.made_for` could write: {"component", "class", "shapes", "weights": {key: 4 numbers}}."""
    if not isinstance(value, Mapping) or not all(_is_line(value.get(k, "")) for k in ("component", "class", "shapes")):
        return False
    weights = value.get("weights", {})
    return isinstance(weights, Mapping) and all(
        isinstance(values, list) and len(values) == 4 and all(map(_is_number, values)) for values in weights.values()
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in KINDS,
    "base": _is_line,
    "prompts": _are_prompts,
    "seeds": _are_seeds,
    "seconds": lambda value: _is_number(value) and value >= 0,
    "routes": lambda value: isinstance(value, list) and set(map(str, value)) <= set(ROUTES),
    "open_share": lambda value: _is_number(value) and 0 <= value <= 1,
    "made_for": _is_model,
}
