"""What is drawn to measure an erasure, as plain data; and the split of selection from testing (law 12).

Every cell has a seed of its own, so that no two pictures share their noise and errors are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuraleraser.canvas import words
from neuraleraser.errors import ConceptError, SplitError
from neuraleraser.settings import SELECTION_SEEDS, TEST_SEEDS, EvaluateSettings

if TYPE_CHECKING:
    from neuraleraser.eraser import Eraser

GRID = "grid"
OWN = "own"
TWO_OBJECTS = "two objects"
HELD_OUT = "held-out phrasing"
IMAGE_TO_IMAGE = "image-to-image"
HELD_OUT_GRID = "held-out grid"

GROUPS = (GRID, OWN, TWO_OBJECTS, HELD_OUT, IMAGE_TO_IMAGE, HELD_OUT_GRID)
"""Groups of cells. An image-to-image cell starts from a render of its own style and objects."""
MAIN = (GRID, OWN, TWO_OBJECTS)
"""The groups that the metrics of a concept are computed on; the others have figures of their own."""

_CELLS = len(words.STYLES) * len(words.OBJECTS)  # seeds in a round
_BLOCK = 15_000  # seeds of a group


@dataclass(frozen=True)
class Cell:
    """One picture to draw: the prompt, its seed, and what the prompt asks for."""

    prompt: str
    seed: int
    style: str
    objects: tuple[str, ...]
    group: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells the cell from all others."""
        return self.prompt, self.seed, self.group


def _seed(group: str, round: int, number: int, seeds: range) -> int:
    return seeds[(_BLOCK * GROUPS.index(group) + _CELLS * round + number) % len(seeds)]


def _indices(style: str, name: str) -> tuple[int, int]:
    return words.STYLES.index(style), words.OBJECTS.index(name)


def _cell(group: str, round: int, style: str, name: str, phrasing: int, seeds: range) -> Cell:
    prompt = words.fresh_prompt([name], style, phrasing)
    i, j = _indices(style, name)
    return Cell(prompt, _seed(group, round, i * len(words.OBJECTS) + j, seeds), style, (name,), group)


def base_cells(
    rounds: int,
    phrasing: int = 0,
    *,
    styles: Sequence[str] = words.STYLES,
    objects: Sequence[str] = words.OBJECTS,
    seeds: range = TEST_SEEDS,
) -> list[Cell]:
    """Every style with every object, `rounds` times, in one of the four phrasings (2 and 3 are held out)."""
    group = GRID if phrasing in range(4)[words.SEEN] else HELD_OUT_GRID
    return [_cell(group, k, s, o, phrasing, seeds) for k in range(rounds) for s in styles for o in objects]


def erasure_cells(
    name: str,
    settings: EvaluateSettings,
    *,
    styles: Sequence[str] = words.STYLES,
    objects: Sequence[str] = words.OBJECTS,
    seeds: range = TEST_SEEDS,
) -> list[Cell]:
    """The cells that only the eraser of `name` needs, beside the grid: own, two objects, held-out phrasings, and
    image-to-image. Raises ConceptError for a name that the canvas has not.
    """
    if name in words.OBJECTS:
        pairs = [(style, name) for style in styles]
    elif name in words.STYLES:
        pairs = [(name, obj) for obj in objects]
    else:
        raise ConceptError(f"the canvas has no concept {name!r}, so there are no cells to measure its erasure on")
    cells = [_cell(OWN, k, s, o, 0, seeds) for k in range(settings.own) for s, o in pairs]
    if name in words.OBJECTS:
        cells += _beside(name, settings.two_objects, styles, [o for o in objects if o != name], seeds)
    held_out = range(4)[words.HELD_OUT]
    for k in range(settings.held_out):
        # Neighbouring cells take turns, and every cell changes its phrasing from round to round.
        cells += [
            _cell(HELD_OUT, k, s, o, held_out[(sum(_indices(s, o)) + k) % len(held_out)], seeds) for s, o in pairs
        ]
    cells += [_cell(IMAGE_TO_IMAGE, k, s, o, 0, seeds) for k in range(settings.image_to_image) for s, o in pairs]
    return cells


def _beside(name: str, rounds: int, styles: Sequence[str], others: Sequence[str], seeds: range) -> list[Cell]:
    """`name` beside each other object, first and second by turns, in varied styles."""
    cells = []
    for k in range(rounds):
        for i, other in enumerate(others):
            style = styles[(3 * i + 7 * k) % len(styles)]
            pair = (name, other) if (i + k) % 2 else (other, name)
            number = words.OBJECTS.index(name) * len(words.OBJECTS) + words.OBJECTS.index(other)
            seed = _seed(TWO_OBJECTS, k, number, seeds)
            cells.append(Cell(words.fresh_prompt(pair, style), seed, style, pair, TWO_OBJECTS))
    return cells


def check_split(eraser: Eraser, cells: Iterable[Cell]) -> None:
    """Raise SplitError where what the eraser was made with overlaps the cells (DESIGN.md, law 12).

    The eraser's header says what it was made with, in "split" or at its top: "seeds" [first, last], and
    optionally "prompts" (texts) and "phrasings" (numbers). No seed and no prompt may be shared, and where
    held-out phrasings are tested, none may have been used.
    """
    split = eraser.header.get("split", eraser.header)
    try:
        first, last = (int(s) for s in split["seeds"])
        phrasings = {int(p) for p in split.get("phrasings", ())}
        prompts = {str(p) for p in split.get("prompts", ())}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SplitError(
            f"the eraser of {eraser.name!r} does not say which seeds it was made with, so nothing can be tested "
            "fairly: make it again with `neuraleraser erase`"
        ) from error
    known = eraser.name in words.OBJECTS or eraser.name in words.STYLES
    reserved = words.phrases_of(eraser.name)[words.HELD_OUT] if known else ()
    leaked = [f"the phrasing {number}" for number in sorted(phrasings & set(range(4)[words.HELD_OUT]))]
    leaked += [repr(prompt) for prompt in sorted(prompts) if any(phrase in prompt for phrase in reserved)]
    for cell in cells:
        if first <= cell.seed <= last:
            raise SplitError(
                f"the eraser of {eraser.name!r} was made with the seeds {first} to {last}, and {cell.prompt!r} would "
                f"be tested with seed {cell.seed}: make it with seeds of {SELECTION_SEEDS.start} to "
                f"{SELECTION_SEEDS.stop - 1}"
            )
        if cell.prompt in prompts:
            raise SplitError(
                f"the eraser of {eraser.name!r} was made with {cell.prompt!r}, which would test it: "
                "make it with other prompts"
            )
        if leaked and cell.group in (HELD_OUT, HELD_OUT_GRID):
            raise SplitError(
                f"the eraser of {eraser.name!r} was made with {leaked[0]}, which is held out for testing: "
                "make it with the first two phrasings of each concept only"
            )
