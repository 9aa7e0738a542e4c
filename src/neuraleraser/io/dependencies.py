"""Packages that only some of the work needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from neuraleraser.errors import MissingDependencyError


def import_optional(module: str, purpose: str, extra: str) -> Any:
    """Import a module of an extra of this package.

    Raises MissingDependencyError, which names the extra, where it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs {error.name or module}, which is not installed: pip install 'neuraleraser[{extra}]'"
        ) from error
