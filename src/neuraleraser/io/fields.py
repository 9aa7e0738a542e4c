"""Checks of JSON values that a stranger may have written, each True for a value that can be used."""

from __future__ import annotations

from typing import Any

from neuraleraser.io.names import prompt_error

MAX_NUMBER = 1e38
"""No float32 is larger, and sums of these stay finite in float64."""


def is_line(value: Any) -> bool:
    """Return True for one printable line of at most 300 characters; it may be empty."""
    return isinstance(value, str) and len(value) <= 300 and value.isprintable()


def is_whole(value: Any) -> bool:
    """Return True for a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return True for a finite number up to MAX_NUMBER either way."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and -MAX_NUMBER <= value <= MAX_NUMBER


def are_numbers(value: Any) -> bool:
    """Return True for a list of such numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def are_prompts(value: Any) -> bool:
    """Return True for a list of texts that can be prompts (`io.names.prompt_error`)."""
    return isinstance(value, list) and all(isinstance(text, str) and prompt_error(text) is None for text in value)
