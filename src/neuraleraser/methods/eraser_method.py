"""Our eraser as a method."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from neuraleraser.eraser import Eraser, Trace, attach
from neuraleraser.errors import SplitError
from neuraleraser.evaluation.method import MadeWith


@dataclass(frozen=True)
class EraserMethod:
    """An eraser at a strength from 0 (nothing) to 2; 1 is as fitted."""

    eraser: Eraser
    strength: float = 1.0

    @property
    def name(self) -> str:
        """ "neuraleraser", with the strength if it is not 1."""
        return "neuraleraser" if self.strength == 1 else f"neuraleraser x{self.strength:g}"

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.eraser.name

    @property
    def kind(self) -> str:
        """ "style" or "object"."""
        return str(self.eraser.header.get("kind"))

    @property
    def key(self) -> str:
        """Digest of the eraser and its strength."""
        return f"{self.eraser.content_hash[:16]}-{self.strength:g}"

    @property
    def made_with(self) -> MadeWith:
        """Seeds, prompts and phrasings in the eraser's header, its own and its reference's (under "reference").

        Raises SplitError for a header that does not say which seeds the eraser was made with, or is malformed.
        """
        header = self.eraser.header
        reference = header.get("reference", {})
        try:
            first, last = header["seeds"]
            own = ((int(first), int(last)),)
            more = tuple((int(a), int(b)) for a, b in reference.get("seeds", ()))
            return MadeWith(
                seeds=own + more,
                prompts=_texts(header, "prompts") + _texts(reference, "prompts"),
                phrasings=tuple(int(p) for p in (*header.get("phrasings", ()), *reference.get("phrasings", ()))),
                prompt_digests=frozenset(reference.get("prompts_sha256", "").split()),
                labels=_texts(reference, "labels"),
                unknown=_unknown(reference),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SplitError(
                f"the eraser of {self.concept!r} does not say which seeds, prompts and reference it was made with "
                f"({error!r}), so nothing can be tested fairly: make it again with `neuraleraser erase`"
            ) from error

    def applied(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Erase."""
        return attach(pipe, self.eraser, self.strength)

    def watched(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Note where the gate opens, and change nothing."""
        return attach(pipe, self.eraser, action="detect")


def _unknown(reference: Mapping[str, Any]) -> str:
    if not reference:
        return "its header does not say what its reference was made with"
    if sae := reference.get("sae"):
        return f"its SAE was trained elsewhere ({sae}), on data that is not known"
    return ""


def _texts(header: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = header.get(name, ())
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} is no list of texts")
    return tuple(values)
