"""Record of the data that a reference was made with, so that no test repeats it (DESIGN.md, law 12)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_PROMPTS = 100
"""Prompts that an eraser's header holds as text; more are held as digests, which keeps its file to kilobytes."""


@dataclass(frozen=True)
class Provenance:
    """Data that a reference was made with: its SAE, and the images on which the SAE's features were seen to fire.

    seeds: ranges of seeds, (first, last) of each. prompts: every prompt. phrasings: numbers of the canvas's phrasings
    (0 to 3) that the prompts use, () for other pipelines. labels: names of the concepts that the prompts were labelled
    with. sae: the source of an SAE that was trained elsewhere, on data that is not known here; "" for our own.
    """

    seeds: tuple[tuple[int, int], ...]
    prompts: tuple[str, ...]
    phrasings: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    sae: str = ""

    def in_full(self) -> dict[str, Any]:
        """Return it as JSON, for a reference's file; `parse` reads it."""
        return {
            "seeds": [list(span) for span in self.seeds],
            "prompts": list(self.prompts),
            "phrasings": list(self.phrasings),
            "labels": list(self.labels),
            "sae": self.sae,
        }

    def in_short(self) -> dict[str, Any]:
        """Return it as JSON, for an eraser's header: more than MAX_PROMPTS prompts are one string of their digests,
        sorted, with blanks between, under "prompts_sha256" in place of "prompts"."""
        short = self.in_full()
        if len(self.prompts) > MAX_PROMPTS:
            del short["prompts"]
            short["prompts_sha256"] = " ".join(sorted({prompt_digest(prompt) for prompt in self.prompts}))
        return short

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Provenance:
        """Read what `in_full` returned. Raises KeyError, TypeError or ValueError for anything else."""
        for name in ("prompts", "labels"):
            if not all(isinstance(text, str) for text in data[name]):
                raise TypeError(f"{name} are not all text")
        spans = []
        for span in data["seeds"]:
            first, last = span
            spans.append((int(first), int(last)))
        return cls(
            tuple(spans),
            tuple(data["prompts"]),
            tuple(int(number) for number in data["phrasings"]),
            tuple(data["labels"]),
            str(data["sae"]),
        )


def prompt_digest(prompt: str) -> str:
    """Return the first 8 hexadecimal digits of the prompt's SHA-256 (UTF-8)."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]
