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
