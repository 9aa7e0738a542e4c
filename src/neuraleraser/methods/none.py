"""Control: nothing is done."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Untouched:
    """The trace of a method that acts nowhere."""

    fired: Mapping[int, object] = field(default_factory=dict)


@dataclass(frozen=True)
class DoNothing:
    """Leaves the pipeline as it is: the score of doing nothing.

    Examples:
        >>> report = evaluate(pipe, [DoNothing("Van_Gogh", "style")], brief, "nothing")
        >>> report.of("none", "Van_Gogh").figures["ua"].value  # of the concept's images, the share that lost it
        0.0
    """

    concept: str
    kind: str
    name: str = "none"
    key: str = "none"
    made_with: None = None

    def applied(self, pipe: Any) -> AbstractContextManager[Untouched]:
        """Do nothing.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; its trace is empty.
        """
        return nullcontext(Untouched())

    def watched(self, pipe: Any) -> AbstractContextManager[Untouched]:
        """Note nothing: it acts nowhere.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; its trace is empty.
        """
        return nullcontext(Untouched())
