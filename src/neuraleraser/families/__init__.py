"""Model families: what is known of each, one object in one file; and what follows of it for a pipeline.

A new family is a file with a `Family` in it, and its name in `FAMILIES`. What was measured on a family (sites, SAEs,
sampling) is asked of a pipeline's own, by `family_of`. What it states of names (classes of blocks, components,
arguments) holds wherever these occur: a hook has a block, and no pipeline to ask (`known_names`).

A pipeline of no family is sampled by the defaults of its own call, its blocks are known by their arguments, and it is
looked at where a block in its middle reads the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuraleraser.families.auraflow import AURAFLOW
from neuraleraser.families.canvas import CANVAS
from neuraleraser.families.family import Blocks, Family, PublishedSAE, RecommendedSite, Render
from neuraleraser.families.flux import CHROMA, FLUX, FLUX_2
from neuraleraser.families.qwen_image import QWEN_IMAGE
from neuraleraser.families.sdxl import SDXL
from neuraleraser.families.stable_diffusion import STABLE_DIFFUSION
from neuraleraser.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from neuraleraser.families.wan import WAN

__all__ = [
    "FAMILIES",
    "UNKNOWN",
    "Blocks",
    "Family",
    "PublishedSAE",
    "RecommendedSite",
    "Render",
    "family_of",
    "known_names",
]

FAMILIES: tuple[Family, ...] = (
    CANVAS,
    STABLE_DIFFUSION,
    SDXL,
    STABLE_DIFFUSION_3,
    FLUX,
    FLUX_2,
    CHROMA,
    AURAFLOW,
    QWEN_IMAGE,
    WAN,
)
"""All families; the first that matches a pipeline is its own."""

UNKNOWN = Family("unknown", lambda pipe: True)
"""The family of every other pipeline."""


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline; `UNKNOWN` where none matches."""
    return next((family for family in FAMILIES if family.matches(pipe)), UNKNOWN)


def known_names(fact: Callable[[Family], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names that any family states as this fact, in the order of the families."""
    return tuple(dict.fromkeys(name for family in FAMILIES for name in fact(family)))
