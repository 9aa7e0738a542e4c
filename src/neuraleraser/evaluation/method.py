"""The contract of anything that erases a concept: our eraser, every other method, and the controls."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


class ActionTrace(Protocol):
    """Record of where a method acted: `eraser.Trace` is one."""

    @property
    def fired(self) -> Mapping[int, object]:
        """Entries of the images in which it acted, or would have; counted from 0 as they were drawn."""
        ...


@dataclass(frozen=True)
class MadeWith:
    """Data that a method was made with and must not be tested on (docs/explanation/laws.md, law 12).

    Examples:
        >>> EraserMethod(eraser).made_with.seeds  # its own, and its reference's
        ((0, 3), (100, 499), (500, 999))
    """

    seeds: tuple[tuple[int, int], ...] = ()
    """Ranges of seeds, [first, last] of each."""
    prompts: tuple[str, ...] = ()
    prompt_digests: frozenset[str] = frozenset()
    """Further prompts, as the first 8 hexadecimal digits of the SHA-256 of their UTF-8."""
    phrasings: tuple[int, ...] = ()
    """Numbers of phrasings, 2 and 3 of which are held out."""
    labels: tuple[str, ...] = ()
    """Concepts that the data was labelled with."""
    unknown: str = ""
    """Sentence for the report on data that is not known; "" if all is."""


class Method(Protocol):
    """A way to erase one concept from a pipeline.

    Attributes:
        name: Name of the method in tables.
        concept: Name of what it erases.
        kind: "style" or "object".
        key: A digest of everything that acts, so that a changed method is measured anew.
        made_with: Data that it was made with; None: no data.

    Examples:
        >>> method: Method = EraserMethod(eraser)  # as are DoNothing, StringFilter and any class of this shape
        >>> with method.applied(pipe) as trace:
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> list(trace.fired)  # images in which it acted
        [0]
    """

    @property
    def name(self) -> str: ...
    @property
    def concept(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def made_with(self) -> MadeWith | None: ...

    def applied(self, pipe: Any) -> AbstractContextManager[ActionTrace | None]:
        """Return a context in which calls of `pipe` erase.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            The context; it yields a trace, or None if the method cannot tell where it acted.
        """
        ...

    def watched(self, pipe: Any) -> AbstractContextManager[ActionTrace | None]:
        """Return a context in which calls of `pipe` change nothing and note in which images the method would act.

        If the method cannot tell, every image is generated with it applied. If it can, all other images need not be
        generated, which is checked on a sample.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            The context; it yields a trace, or None if the method cannot tell.
        """
        ...
