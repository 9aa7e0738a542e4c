"""Settings of the canvas's verbs; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuraleraser.canvas.words import NONE, OBJECTS
from neuraleraser.errors import ConceptError
from neuraleraser.settings import MAX_COUNT, check_number, check_whole


@dataclass(frozen=True)
class TrainCanvas:
    """Train the canvas pipeline from nothing (or from the shipped weights).

    Raises ConceptError for an unknown object, SettingsError for a value out of range.
    """

    folder: Path = Path("runs/canvas")
    """Where renders, checkpoints and the finished pipeline go."""
    renders: int = 60_000
    """How many pictures to render for training."""
    vae_steps: int = 2_500
    """Autoencoder steps of 32 crops of 32 px."""
    steps: int = 9_000
    """Denoiser steps of `batch` pictures."""
    batch: int = 64
    """Pictures in a denoiser step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the denoiser."""
    warm_start: bool = False
    """Start the denoiser from the shipped weights, with the shipped autoencoder."""
    twice: tuple[str, ...] = ()
    """Objects whose pictures the denoiser sees twice as often: those that it draws worst. "none": pictures of none."""
    minutes: float = 0
    """Stop the denoiser after this long (0: when its steps are done); run again to go on."""
    compile: bool = True
    """Compile the training step: about 1.8 times faster after one or two minutes."""
    seed: int = 0
    """Seed of initial weights, order, noise and captions."""

    def __post_init__(self) -> None:
        for name in ("renders", "vae_steps", "steps", "batch"):
            check_whole(name, getattr(self, name), 1, 100 * MAX_COUNT)
        check_number("learning_rate", self.learning_rate, 0, 10)
        check_number("minutes", self.minutes, 0, MAX_COUNT)
        check_whole("seed", self.seed, 0, MAX_COUNT)  # multiplied to tell steps and captions apart
        if unknown := sorted(set(self.twice) - {*OBJECTS, NONE}):
            raise ConceptError(
                f"{', '.join(unknown)} to be seen twice: pass objects of {', '.join(OBJECTS)}, or {NONE}"
            )
