"""Cells: images to generate to measure an erasure, as plain data.

Every cell of a vocabulary has a seed of its own, so that no two images share their noise and errors are independent.
Published protocols take the same few seeds for all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuraleraser.settings import Sampling
from neuraleraser.sites.routes import (
    IMAGE_ROUTES,
    INPAINTING,
    INVERTED_LATENTS,
    LEARNED_EMBEDDINGS,
    NAMED,
    PARAPHRASED,
    START_IMAGE,
)
from neuraleraser.vocabulary import Vocabulary

GRID = "grid"
TARGET = "target"
TWO_OBJECTS = "two objects"
HELD_OUT = "held-out phrasing"
IMAGE_TO_IMAGE = "image-to-image"
HELD_OUT_GRID = "held-out grid"
FRAGMENTS = "fragments"
NEUTRAL = "image-to-image, neutral"
EMPTY = "image-to-image, empty"
HALF = "inpainting, neutral"
CEILING = "image-to-image, ceiling"
HALF_CEILING = "inpainting, ceiling"
INVERTED = "inverted latents"
INVERTED_CONTROL = "inverted latents, control"
LEARNED = "learned embeddings"
LESSON = "learned embeddings, lesson"
PROMPTS = "prompts"
ATTACK = "attack by "
"""Begins the groups of attacks, which the name of the attack ends."""

GROUPS = (
    *(GRID, TARGET, TWO_OBJECTS, HELD_OUT, IMAGE_TO_IMAGE, HELD_OUT_GRID, FRAGMENTS),
    *(NEUTRAL, EMPTY, HALF, CEILING, HALF_CEILING, INVERTED),
)
"""Groups of cells, each with a block of seeds of its own.

Four start from a picture of the concept: with a prompt that names it (`IMAGE_TO_IMAGE`), with one that does not, with
none, and with half of the picture drawn anew. Their ceilings are of the base alone, which is asked for the same picture
without the concept. `INVERTED` starts from the noise that such a picture is run backwards to, asked for nothing; its
control, drawn by a denoiser of random weights, has seeds of the same block.

`LEARNED` has seeds of the fragments' block: its prompts hold a word for embeddings that were learned on the base model.
A `LESSON` is a picture and a prompt that they are learned on, and is not drawn. `PROMPTS` are of a file, with the seeds
that stand there.
"""
MAIN_GROUPS = (GRID, TARGET, TWO_OBJECTS, PROMPTS)
"""The groups that the metrics of a concept are computed on; the others have figures of their own."""

ROUTE_OF_GROUP = {
    **dict.fromkeys((HELD_OUT, HELD_OUT_GRID), PARAPHRASED),
    **dict.fromkeys((IMAGE_TO_IMAGE, NEUTRAL, EMPTY, CEILING, LESSON), START_IMAGE),
    **dict.fromkeys((HALF, HALF_CEILING), INPAINTING),
    **dict.fromkeys((INVERTED, INVERTED_CONTROL), INVERTED_LATENTS),
    **{FRAGMENTS: FRAGMENTS, LEARNED: LEARNED_EMBEDDINGS},
}
"""Route by which the concept enters, of the groups in which it is not simply named."""
CEILING_OF = {
    **dict.fromkeys((IMAGE_TO_IMAGE, NEUTRAL, EMPTY), CEILING),
    **{HALF: HALF_CEILING, INVERTED: INVERTED_CONTROL},
}
"""Groups that start from a picture, each with the group of its ceiling, or of its control."""
STRENGTHS = (0.3, 0.5, 0.7)
"""Strengths of image-to-image, which cells take by turns."""


@dataclass(frozen=True)
class StartImage:
    """The picture that an image starts from, and what is kept of it.

    Attributes:
        style: The style that it shows; "" if none.
        objects: The objects that it shows.
        seed: The seed that it is rendered with.
        strength: How much of the way back to noise it is taken; None: as `Sampling` says.
        half: The half of the picture that inpainting draws anew.

    Examples:
        >>> start = StartImage("Van_Gogh", ("Cats",), 10_000, strength=0.5)
        >>> Cell("a picture of a cat", 10_000, "", ("Cats",), "image-to-image", start).asks_for("Van_Gogh")
        False
    """

    style: str
    objects: tuple[str, ...]
    seed: int
    strength: float | None = None
    half: Literal["left", "right"] = "left"

    @property
    def shows(self) -> tuple[str, ...]:
        """The names that it shows."""
        return tuple(name for name in (self.style, *self.objects) if name)


@dataclass(frozen=True)
class Cell:
    """One image to generate: the prompt, its seed, and what the prompt asks for.

    A cell of fragments, or of learned embeddings, asks for what these accompany, not for their concept.

    Examples:
        >>> cell = Cell("a cat as a Van Gogh painting", 10_000, "Van_Gogh", ("Cats",), "grid")
        >>> cell.asks_for("Van_Gogh"), cell.asks_for("Cats"), cell.route
        (True, True, 'named')
    """

    prompt: str
    seed: int
    style: str
    objects: tuple[str, ...]
    group: str
    start_image: StartImage | None = None
    """What it starts from, on a route of pictures; None: a picture of what the prompt says."""
    learned: str = ""
    """Concept for which the prompt's word "<learned>" stands, in the group "learned embeddings"."""

    @property
    def key(self) -> tuple[str, int, str]:
        """Identity of the cell."""
        return self.prompt, self.seed, self.group

    @property
    def route(self) -> str:
        """Route by which the concept enters."""
        return ROUTE_OF_GROUP.get(self.group, "attack" if self.group.startswith(ATTACK) else NAMED)

    @property
    def start(self) -> StartImage | None:
        """The picture that the image starts from, or whose latents are inverted; None where it starts from noise."""
        if self.route not in (*IMAGE_ROUTES, INVERTED_LATENTS):
            return None
        return self.start_image or StartImage(self.style, self.objects, self.seed)

    def asks_for(self, concept: str) -> bool:
        """Tell whether the prompt asks for a style or an object.

        Args:
            concept: Name of the style or object.

        Returns:
            True if the prompt asks for it.
        """
        return concept == self.style or concept in self.objects


@dataclass(frozen=True)
class EvaluationProtocol:
    """All cells of one evaluation.

    Attributes:
        cells: Cells that each erased concept is measured on, by its name.
        base_only: Further cells, generated by the base model alone.
        vocabulary: Vocabulary that the prompts are made of, if it is known.
        start_images: Called as `start_images(starts, size)`; returns the pictures, uint8 [N, size, size, 3], from which
            cells of the routes "start image", "inpainting" and "inverted latents" start.
        lessons: Cells that the embeddings of a concept are learned on, by its name: their start images, and prompts
            that hold the word "<learned>".
        name: Name of a published protocol, whose prompts and seeds are given: where a method was made with one of
            these seeds, the report says so; "" for cells of one's own, which such a method is refused on.
        sampling: How the published protocol generates images; the settings of `evaluate` come before it. None: as
            the pipeline is usually sampled.
        notes: Sentences for the report on how this differs from what was published.

    Examples:
        >>> prompt = "a cat as a Van Gogh painting"
        >>> cells = [Cell(prompt, seed, "Van_Gogh", ("Cats",), "grid") for seed in (10_000, 10_001)]
        >>> protocol = EvaluationProtocol({"Van_Gogh": cells})
        >>> report = evaluate(pipe, [EraserMethod(eraser)], brief, "cats", protocol=protocol)
        >>> report.of("neuraleraser", "Van_Gogh").figures["unchanged_share"] is None  # no cell is of anything else
        True
    """

    cells: Mapping[str, Sequence[Cell]]
    base_only: Sequence[Cell] = ()
    vocabulary: Vocabulary | None = field(default=None, compare=False)
    start_images: Callable[[Sequence[StartImage], int], NDArray[np.uint8]] | None = field(default=None, compare=False)
    lessons: Mapping[str, Sequence[Cell]] = field(default_factory=dict)
    name: str = ""
    sampling: Sampling | None = None
    notes: Sequence[str] = ()

    def all_cells(self) -> list[Cell]:
        """Return every cell once, in a fixed order."""
        parts = (*self.cells.values(), self.base_only)
        return list(dict.fromkeys(cell for part in parts for cell in part))
