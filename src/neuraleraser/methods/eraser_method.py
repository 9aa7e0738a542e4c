"""Our eraser as a method."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from neuraleraser.eraser import Eraser, Provenance, Trace, attach
from neuraleraser.errors import SplitError
from neuraleraser.evaluation.method import MadeWith


@dataclass(frozen=True)
class EraserMethod:
    """An eraser at a strength from 0 (nothing) to 2; 1 is as fitted.

    Examples:
        >>> method = EraserMethod(eraser, strength=0.5)
        >>> method.name, method.concept
        ('neuraleraser x0.5', 'Van_Gogh')
    """

    eraser: Eraser
    strength: float = 1.0

    @property
    def name(self) -> str:
        """Name of the method that made the eraser, "neuraleraser" or "saeuron"; with the strength if it is not 1."""
        name = self.eraser.header.method or "neuraleraser"
        return name if self.strength == 1 else f"{name} x{self.strength:g}"

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.eraser.name

    @property
    def kind(self) -> str:
        """ "style", "object" or "other"."""
        return self.eraser.header.kind or "other"

    @property
    def key(self) -> str:
        """Digest of the eraser and its strength."""
        return f"{self.eraser.content_hash[:16]}-{self.strength:g}"

    @property
    def made_with(self) -> MadeWith:
        """Seeds, prompts and phrasings in the eraser's header, its own and its reference's.

        Raises:
            SplitError: The header does not say which seeds the eraser was made with.
        """
        header = self.eraser.header
        if header.seeds is None:
            raise SplitError(
                f"the eraser of {self.concept!r} does not say which seeds it was made with, so nothing can be tested "
                "fairly: make it again with `neuraleraser erase`"
            )
        reference = header.reference or Provenance()
        return MadeWith(
            seeds=(header.seeds, *reference.seeds),
            prompts=header.prompts + reference.prompts,
            phrasings=reference.phrasings,
            prompt_digests=frozenset(reference.prompt_digests),
            labels=reference.labels,
            unknown=_unknown(header.reference),
        )

    def applied(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Erase.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields the trace.
        """
        return attach(pipe, self.eraser, self.strength)

    def watched(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Note where the gate opens, and change nothing.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields the trace.
        """
        return attach(pipe, self.eraser, action="detect")


def _unknown(reference: Provenance | None) -> str:
    if reference is None:
        return "its header does not say what its reference was made with"
    if reference.sae:
        return f"its SAE was trained elsewhere ({reference.sae}), on data that is not known"
    return ""
