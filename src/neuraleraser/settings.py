"""Settings of the verbs; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from neuraleraser.errors import SettingsError

SELECTION_SEEDS = range(0, 1000)
"""Seeds that erasers are made and defaults are chosen with."""
TEST_SEEDS = range(10_000, 110_000)
"""Seeds that erasers are tested with, and never made (DESIGN.md, law 12)."""
STREAM_SEEDS = range(2**31, 2**32)
"""Seeds that endless streams of images for training are drawn with. Torch's generator on the CPU knows a seed by its
last 32 bits: from 2^32 on the first seeds, and with them the tests' noise, would come again."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int = 25
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 draws without guidance."""
    batch: int = 20
    """Images drawn together."""
    height: int = 0
    """Height in pixels (0: the pipeline's own)."""
    width: int = 0
    """Width in pixels (0: the pipeline's own)."""
    strength: float = 0.8
    """For image-to-image: how much of the way back to noise the start image is taken."""
    pad: bool = True
    """Fill the last batch up, so that its images have the same bits in any company."""


@dataclass(frozen=True)
class StreamSettings:
    """How activations are drawn for training, mixed, and cut into batches.

    Raises SettingsError for a value out of range.
    """

    batch: int = 4096
    """Activation vectors in a training batch."""
    per_image: int = 256
    """Vectors kept of an image at each site, over all its steps, positions and guidance branches."""
    images: int = 0
    """Images to draw, which are used again and again, in a new order; 0: new ones all along."""
    window: int = 64
    """How many batches of images are mixed at a time, in memory; training starts with a quarter of them. Of few images
    an SAE learns what is theirs alone, and forgets it with them (docs/LOG.md)."""
    reuse: int = 16
    """How often a vector is used before it leaves memory: drawing takes longer than training."""
    per_map: int = 1
    """Vectors of one image and step that stay together, for labels of whole images; 1: each goes alone."""
    seed: int = 0
    """Decides the images' noise and all orders."""
    ahead: int = 1
    """Batches of images that a thread draws during training; 0: drawing and training take turns."""
    sampling: Sampling | None = None
    """How images are drawn; None: as the pipeline usually is."""

    def __post_init__(self) -> None:
        for name in ("batch", "per_image", "window", "reuse", "per_map"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: pass at least 1")
        for name in ("images", "seed", "ahead"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: pass 0 or more")
        for name in ("batch", "per_image"):
            if getattr(self, name) % self.per_map:
                raise SettingsError(f"{name} is {getattr(self, name)}: pass a multiple of per_map = {self.per_map}")


@dataclass(frozen=True)
class InspectSettings:
    """On what an SAE is measured. Raises SettingsError for a value out of range."""

    prompts: Path | None = None
    """Text file, one prompt a line; None: captions of the canvas."""
    images: int = 20
    """Images to measure on, drawn in one batch."""
    per_image: int = 2048
    """Activation vectors of an image, over all its steps, positions and guidance branches."""
    times: int = 6
    """Timesteps at which the denoising loss is measured."""
    seed: int = 200_000
    """Seed of the first image; the others follow. Erasers are made and tested with other seeds."""
    sheet: Path | None = None
    """PNG file for the images: as the model draws them (left), and with reconstructions (right)."""

    def __post_init__(self) -> None:
        for name in ("images", "per_image", "times"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: pass at least 1")


@dataclass(frozen=True)
class FitSettings:
    """How an eraser is made from a concept."""

    pairs: int = 24
    """Pairs of prompts drawn to learn from."""
    beside: int = 36
    """Further prompts of an object that something else stands beside, drawn without it, to learn what is to stay."""
    rank: int = 32
    """Rank of a correction."""
    steps: int = 160
    """Optimiser steps of the correction."""
    batch: int = 24
    """States in an optimiser step."""
    learning_rate: float = 4e-3
    """Peak learning rate of the correction; it falls to zero over the last 40 % of the steps."""
    seed: int = 0
    """First of the selection seeds (0 to 999) that images are drawn with."""


@dataclass(frozen=True)
class EvaluateSettings:
    """What is drawn to measure erasers. A round is one image of every cell of a group, each with its own seed."""

    grid: int = 3
    """Rounds of every style with every object; made once, shared by all erasers."""
    own: int = 2
    """More rounds of the erased concept with everything of the other domain."""
    two_objects: int = 2
    """Rounds of prompts that name an erased object beside each other one."""
    held_out: int = 2
    """Rounds of the erased concept in phrasings that no eraser is made with."""
    image_to_image: int = 1
    """Rounds that start from a render of what the prompt says."""
    held_out_grid: int = 1
    """Rounds of the whole grid in held-out phrasings, without any eraser."""
    timings: int = 7
    """How often plain sampling and sampling with the eraser are timed against each other."""
    timed_images: int = 16
    """Images in a timed batch."""
    sampling: Sampling = field(default_factory=lambda: Sampling(batch=40))
    """How all images are drawn."""
    styles: tuple[str, ...] = ()
    """Only these styles; none named: all."""
    objects: tuple[str, ...] = ()
    """Only these objects; none named: all."""


@dataclass(frozen=True)
class DemoSettings:
    """Erase five concepts one at a time, from phrases, and measure it."""

    folder: Path = Path("demo")
    """Where report.html, report.json, contact.png and the erasers go."""
    phrases: tuple[str, ...] = ("Van Gogh style", "Sponge dabbed style", "Superstring style", "Fire", "cat")
    """What to erase, in words."""
    model: str = "canvas"
    """The pipeline: 'canvas', or a folder with another canvas."""
    dictionary: Path | None = None
    """Folder of the SAE and its background to fit with; None: the one that ships."""
    resume: bool = False
    """Go on where an interrupted demo stopped, instead of starting anew."""
    fit: FitSettings = field(default_factory=FitSettings)
    """How erasers are made."""
    evaluate: EvaluateSettings = field(
        default_factory=lambda: EvaluateSettings(
            grid=1,
            own=1,
            two_objects=1,
            held_out=1,
            image_to_image=0,
            held_out_grid=0,
            timings=3,
            timed_images=8,
            sampling=Sampling(batch=40),
        )
    )
    """How much is measured."""
