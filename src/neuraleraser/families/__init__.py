"""Model families: what is known of each, one object in one file; and what follows of it for a pipeline.

A new family is a file with a `Family` in it, and its name in `FAMILIES`. A pipeline of no family is sampled by the
defaults of its own call, and looked at where a block in its middle reads the prompt.
"""

from __future__ import annotations

from typing import Any

from neuraleraser.families.canvas import CANVAS
from neuraleraser.families.family import Family, PublishedSAE, RecommendedSite, Render
from neuraleraser.families.flux import FLUX
from neuraleraser.families.sdxl import SDXL
from neuraleraser.families.stable_diffusion import STABLE_DIFFUSION

__all__ = ["FAMILIES", "UNKNOWN", "Family", "PublishedSAE", "RecommendedSite", "Render", "family_of"]

FAMILIES: tuple[Family, ...] = (CANVAS, STABLE_DIFFUSION, SDXL, FLUX)
"""All families; the first that matches a pipeline is its own."""

UNKNOWN = Family("unknown", lambda pipe: True)
"""The family of every other pipeline."""


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline; `UNKNOWN` where none matches."""
    return next((family for family in FAMILIES if family.matches(pipe)), UNKNOWN)
