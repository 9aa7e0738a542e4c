"""Settings of the verbs; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale; 1 draws without guidance."""
    batch: int = 20
    """Images drawn together."""
    height: int = 0
    """Height in pixels (0: the pipeline's own)."""
    width: int = 0
    """Width in pixels (0: the pipeline's own)."""
    strength: float = 0.6
    """For image-to-image: how much of the way back to noise the start image is taken."""
    pad: bool = True
    """Fill the last batch up, so that its images have the same bits in any company."""


@dataclass(frozen=True)
class FitSettings:
    """How an eraser is made from a concept."""

    pairs: int = 24
    """Pairs of prompts drawn to learn from."""
    rank: int = 8
    """Rank of the correction at each site."""
    bins: int = 5
    """Groups of timesteps with a correction of their own."""
    steps: int = 240
    """Optimiser steps of the correction, at most."""
    batch: int = 24
    """States in an optimiser step."""
    seconds: float = 60.0
    """Time for the correction; its learning rate falls to zero at whichever end comes first."""
    learning_rate: float = 4e-3
    """Peak learning rate of the correction."""
    seed: int = 0
    """First of the selection seeds (0 to 999) that images are drawn with."""
