"""Record of the data that a reference was made with, so that no test repeats it (docs/explanation/laws.md, law 12)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from neuraleraser.io.fields import are_prompts, is_whole
from neuraleraser.settings import MAX_SEED

MAX_PROMPTS = 100
"""Prompts that an eraser's header holds as text; more are held as digests, which keeps its file to kilobytes."""
_DIGESTS = re.compile(r"[0-9a-f]{8}( [0-9a-f]{8})*")


@dataclass(frozen=True)
class Provenance:
    """Data that a reference was made with: its SAE, and the images on which the SAE's features were seen to fire.

    Examples:
        >>> made = eraser.header.reference
        >>> made.seeds[0], "Van_Gogh" in made.labels
        ((100, 499), True)
    """

    seeds: tuple[tuple[int, int], ...] = ()
    """Ranges of seeds, (first, last) of each."""
    prompts: tuple[str, ...] = ()
    """Every prompt, or none where digests stand for them."""
    phrasings: tuple[int, ...] = ()
    """Numbers of the canvas's phrasings (0 to 3) that the prompts use; none for other pipelines."""
    labels: tuple[str, ...] = ()
    """Names of the concepts that the prompts were labelled with."""
    sae: str = ""
    """Source of an SAE that was trained elsewhere, on data that is not known here; "" for our own."""
    prompt_digests: tuple[str, ...] = ()
    """Digests of prompts, in place of their text (`prompt_digest`)."""

    def in_short(self) -> Provenance:
        """Return it for an eraser's header: with digests, sorted, in place of more than MAX_PROMPTS prompts."""
        if len(self.prompts) <= MAX_PROMPTS:
            return self
        return replace(self, prompts=(), prompt_digests=tuple(sorted({prompt_digest(p) for p in self.prompts})))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON; digests are one string with blanks between, "prompts_sha256", in place of "prompts"."""
        digests = {"prompts_sha256": " ".join(self.prompt_digests)} if self.prompt_digests else {}
        return {
            "seeds": [list(span) for span in self.seeds],
            **({} if digests and not self.prompts else {"prompts": list(self.prompts)}),
            "phrasings": list(self.phrasings),
            "labels": list(self.labels),
            "sae": self.sae,
            **digests,
        }

    @classmethod
    def parse(cls, data: Any) -> Provenance:
        """Read what `as_json` returned.

        Args:
            data: The JSON.

        Returns:
            The provenance.

        Raises:
            ValueError: It is anything else.
        """
        names = {"seeds", "phrasings", "labels", "sae"}
        if not isinstance(data, Mapping) or not names <= data.keys() <= names | {"prompts", "prompts_sha256"}:
            raise ValueError("expected seeds, prompts or prompts_sha256, phrasings, labels and sae")
        digests = data.get("prompts_sha256", "")
        found = {"prompts": data.get("prompts", [] if digests else None), **data, "prompts_sha256": digests}
        for name, fits in _FIELD_CHECKS.items():
            if not fits(found[name]):
                raise ValueError(f"its {name} cannot be read")
        return cls(
            seeds=tuple((first, last) for first, last in found["seeds"]),
            prompts=tuple(found["prompts"]),
            phrasings=tuple(found["phrasings"]),
            labels=tuple(found["labels"]),
            sae=found["sae"],
            prompt_digests=tuple(digests.split()),
        )


def prompt_digest(prompt: str) -> str:
    """Return the first 8 hexadecimal digits of the prompt's SHA-256 (UTF-8)."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def is_span(value: Any) -> bool:
    """Return True for a range of seeds as JSON has it: [first, last]."""
    return isinstance(value, list) and len(value) == 2 and _are_whole(value) and 0 <= value[0] <= value[1] <= MAX_SEED


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole, value))


_FIELD_CHECKS = {
    "seeds": lambda value: isinstance(value, list) and all(map(is_span, value)),
    "prompts": are_prompts,
    "phrasings": _are_whole,
    "labels": are_prompts,
    "sae": lambda value: isinstance(value, str),
    "prompts_sha256": lambda value: value == "" or (isinstance(value, str) and bool(_DIGESTS.fullmatch(value))),
}
"""Check of each field, as JSON has it."""
