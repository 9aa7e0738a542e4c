"""Cells: what is drawn to measure an erasure, as plain data.

Every cell has a seed of its own, so that no two pictures share their noise and errors are independent. Sealed concepts
are left out, as something to erase and as something to keep, unless they are asked for (`sealed=True`, of
`evaluate --sealed` alone): who measures another concept must not look at them by the way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neuraleraser.canvas import words
from neuraleraser.errors import ConceptError, NeuralEraserError, SplitError
from neuraleraser.settings import SEALED_SEEDS, TEST_SEEDS, EvaluateSettings
from neuraleraser.sites.routes import NAMED, PARAPHRASED, START_IMAGE

GRID = "grid"
TARGET = "target"
TWO_OBJECTS = "two objects"
HELD_OUT = "held-out phrasing"
IMAGE_TO_IMAGE = "image-to-image"
HELD_OUT_GRID = "held-out grid"
FRAGMENTS = "fragments"

GROUPS = (GRID, TARGET, TWO_OBJECTS, HELD_OUT, IMAGE_TO_IMAGE, HELD_OUT_GRID, FRAGMENTS)
"""Groups of cells, each with a block of seeds of its own; an image-to-image cell starts from a render of its own style
and objects."""
MAIN = (GRID, TARGET, TWO_OBJECTS)
"""The groups that the metrics of a concept are computed on; the others have figures of their own."""

ROUTE_OF_GROUP = {HELD_OUT: PARAPHRASED, HELD_OUT_GRID: PARAPHRASED, IMAGE_TO_IMAGE: START_IMAGE, FRAGMENTS: FRAGMENTS}
"""Route by which the concept enters, of the groups in which it is not simply named."""

_CELLS = len(words.STYLES) * len(words.OBJECTS)  # seeds in a round
_BLOCK = 15_000  # seeds of a group; the last, of fragments, has 10,000
_FRAGMENT_ROUNDS, _FRAGMENTS = 2, 100  # companies of each fragment, and seeds of a concept in a round


@dataclass(frozen=True)
class Cell:
    """One picture to draw: the prompt, its seed, and what the prompt asks for.

    A cell of fragments asks for what the fragment accompanies, not for its concept.
    """

    prompt: str
    seed: int
    style: str
    objects: tuple[str, ...]
    group: str

    @property
    def key(self) -> tuple[str, int, str]:
        """Identity of the cell."""
        return self.prompt, self.seed, self.group

    @property
    def route(self) -> str:
        """Route by which the concept enters."""
        return ROUTE_OF_GROUP.get(self.group, NAMED)

    def asks_for(self, concept: str) -> bool:
        """Tell whether the prompt asks for a style or an object."""
        return concept == self.style or concept in self.objects


@dataclass(frozen=True)
class EvaluationProtocol:
    """All cells of one evaluation.

    `cells`: those that each erased concept is measured on, by its name. `base_only`: further cells, drawn by the base
    alone. `start_images(cells, size)`: the images uint8 [N, size, size, 3] that cells of the route "start image" start
    from.
    """

    cells: Mapping[str, Sequence[Cell]]
    base_only: Sequence[Cell] = ()
    start_images: Callable[[Sequence[Cell], int], NDArray[np.uint8]] | None = field(default=None, compare=False)

    def all_cells(self) -> list[Cell]:
        """Return every cell once, in a fixed order."""
        parts = (*self.cells.values(), self.base_only)
        return list(dict.fromkeys(cell for part in parts for cell in part))


def canvas_protocol(concepts: Sequence[str], settings: EvaluateSettings, *, sealed: bool = False) -> EvaluationProtocol:
    """Return the cells that measure the erasure of each of `concepts` on the canvas.

    Raises ConceptError for a name that the canvas does not have, SplitError for a sealed one, or one among
    `settings.styles` and `settings.objects`, unless `sealed`.
    """
    s = settings
    styles = s.styles or (words.STYLES if sealed else words.OPEN_STYLES)
    objects = s.objects or (words.OBJECTS if sealed else words.OPEN_OBJECTS)
    if not sealed:
        check_open((*styles, *objects))
    seeds = SEALED_SEEDS if sealed else TEST_SEEDS
    grid = base_cells(s.grid_rounds, styles=styles, objects=objects, seeds=seeds)
    cells = {
        name: [*grid, *target_cells(name, s, styles=styles, objects=objects, seeds=seeds, sealed=sealed)]
        for name in concepts
    }
    extra = [
        cell
        for k, phrasing in enumerate(range(4)[words.HELD_OUT])
        for cell in base_cells(s.held_out_grid_rounds, phrasing, styles=styles, objects=objects, seeds=seeds)
        # Half of the cells in each phrasing; each cell of a round once.
        if (words.STYLES.index(cell.style) + words.OBJECTS.index(cell.objects[0])) % 2 == k
    ]
    return EvaluationProtocol(cells, extra, renders)


def check_open(names: Iterable[str]) -> None:
    """Raise SplitError if one of `names` is a sealed concept."""
    closed = sorted({*words.SEALED_STYLES, *words.SEALED_OBJECTS} & set(names))
    if closed:
        raise SplitError(
            f"{', '.join(closed)}: sealed until all is frozen, so nothing may draw or read it but "
            "`neuraleraser evaluate --sealed`; pass other concepts"
        )


def base_cells(
    rounds: int,
    phrasing: int = 0,
    *,
    styles: Sequence[str] = words.OPEN_STYLES,
    objects: Sequence[str] = words.OPEN_OBJECTS,
    seeds: range = TEST_SEEDS,
) -> list[Cell]:
    """Return every style with every object, `rounds` times, in one of the four phrasings (2 and 3 are held out)."""
    group = GRID if phrasing in range(4)[words.SEEN] else HELD_OUT_GRID
    return [_cell(group, k, s, o, phrasing, seeds) for k in range(rounds) for s in styles for o in objects]


def target_cells(
    name: str,
    settings: EvaluateSettings,
    *,
    styles: Sequence[str] = words.OPEN_STYLES,
    objects: Sequence[str] = words.OPEN_OBJECTS,
    seeds: range = TEST_SEEDS,
    sealed: bool = False,
) -> list[Cell]:
    """Return the cells that only the erasure of `name` needs, beside the grid: target, two objects, held-out phrasings,
    image-to-image, and fragments.

    Raises ConceptError for a name that the canvas does not have, SplitError for a sealed one unless `sealed`.
    """
    if not sealed:
        check_open([name])
    if name in words.OBJECTS:
        pairs = [(style, name) for style in styles]
    elif name in words.STYLES:
        pairs = [(name, obj) for obj in objects]
    else:
        raise ConceptError(
            f"the canvas has no concept {name!r}, so there are no cells to measure its erasure on: "
            "pass a protocol of your own"
        )
    cells = [_cell(TARGET, k, s, o, 0, seeds) for k in range(settings.target_rounds) for s, o in pairs]
    if name in words.OBJECTS:
        others = [o for o in objects if o != name]
        cells += _two_objects(name, settings.two_object_rounds, styles, others, seeds)
    held_out = range(4)[words.HELD_OUT]
    for k in range(settings.held_out_rounds):
        # Neighbouring cells take turns, and every cell changes its phrasing from round to round.
        cells += [
            _cell(HELD_OUT, k, s, o, held_out[(sum(_indices(s, o)) + k) % len(held_out)], seeds) for s, o in pairs
        ]
    cells += [_cell(IMAGE_TO_IMAGE, k, s, o, 0, seeds) for k in range(settings.image_to_image_rounds) for s, o in pairs]
    return cells + fragment_cells(name, settings.fragment_prompts, seeds=seeds)


def fragment_cells(name: str, count: int, *, seeds: range = TEST_SEEDS) -> list[Cell]:
    """Return at most `count` cells whose prompts hold one or two words of the concept's phrasings and never a whole
    one: of a style beside an object ("a horse, swirling strokes"), of an object alone ("a picture of purring kitten").

    Each fragment comes twice, of a style beside two objects; fewer than all are a fixed choice.
    """
    concepts = (*words.OBJECTS, *words.STYLES)
    cells = []
    for k in range(_FRAGMENT_ROUNDS):
        for i, fragment in enumerate(words.fragments(name)):
            number = _FRAGMENTS * (_FRAGMENT_ROUNDS * concepts.index(name) + k) + i
            seed = seeds[(_BLOCK * GROUPS.index(FRAGMENTS) + number) % len(seeds)]
            if name in words.STYLES:
                company = words.OPEN_OBJECTS[(3 * i + 5 * k) % len(words.OPEN_OBJECTS)]
                prompt, objects = f"{words.OBJECT_PHRASES[company][0]}, {fragment}", (company,)
            else:
                prompt, objects = f"a picture of {fragment}", ()
            cells.append(Cell(prompt, seed, "", objects, FRAGMENTS))
    chosen = sorted(random.Random(0).sample(range(len(cells)), min(count, len(cells))))
    return [cells[i] for i in chosen]


def renders(cells: Sequence[Cell], size: int) -> NDArray[np.uint8]:
    """Return a render of each cell's own content [N, size, size, 3], from its seed."""
    try:
        from neuraleraser.canvas.render import Content, render
    except ImportError as error:
        raise NeuralEraserError(
            f"rendering needs {error.name}, which is not installed: pip install 'neuraleraser[canvas]'"
        ) from error
    return np.stack([render(Content(c.objects, c.style), c.seed, size) for c in cells])


def _seed(group: str, round: int, number: int, seeds: range) -> int:
    return seeds[(_BLOCK * GROUPS.index(group) + _CELLS * round + number) % len(seeds)]


def _indices(style: str, name: str) -> tuple[int, int]:
    return words.STYLES.index(style), words.OBJECTS.index(name)


def _cell(group: str, round: int, style: str, name: str, phrasing: int, seeds: range) -> Cell:
    prompt = words.fresh_prompt([name], style, phrasing)
    i, j = _indices(style, name)
    return Cell(prompt, _seed(group, round, i * len(words.OBJECTS) + j, seeds), style, (name,), group)


def _two_objects(name: str, rounds: int, styles: Sequence[str], others: Sequence[str], seeds: range) -> list[Cell]:
    """Return `name` beside each other object, first and second by turns, in varied styles."""
    cells = []
    for k in range(rounds):
        for i, other in enumerate(others):
            style = styles[(3 * i + 7 * k) % len(styles)]
            pair = (name, other) if (i + k) % 2 else (other, name)
            number = words.OBJECTS.index(name) * len(words.OBJECTS) + words.OBJECTS.index(other)
            seed = _seed(TWO_OBJECTS, k, number, seeds)
            cells.append(Cell(words.fresh_prompt(pair, style), seed, style, pair, TWO_OBJECTS))
    return cells
