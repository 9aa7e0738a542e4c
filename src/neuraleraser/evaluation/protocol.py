"""Cells: what is drawn to measure an erasure, as plain data.

Every cell has a seed of its own, so that no two pictures share their noise and errors are independent. Sealed concepts
are left out, as something to erase and as something to keep, unless they are asked for (`sealed=True`, of
`evaluate --sealed` alone): who measures another concept must not look at them by the way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from neuraleraser.errors import ConceptError, SettingsError, SplitError
from neuraleraser.families import Render
from neuraleraser.settings import SEALED_SEEDS, TEST_SEEDS, EvaluateSettings
from neuraleraser.sites.routes import NAMED, PARAPHRASED, START_IMAGE
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import PHRASINGS, SEEN, Vocabulary

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

_BLOCK = 15_000  # seeds of a group; the last, of fragments, has 10,000
_FRAGMENT_ROUNDS, _FRAGMENTS = 2, 100  # companies of each fragment, and seeds of a concept in a round


@dataclass(frozen=True)
class Cell:
    """One picture to draw: the prompt, its seed, and what the prompt asks for.

    A cell of fragments asks for what the fragment accompanies, not for its concept.

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
    from. `vocabulary`: what the prompts are made of, where that is known.

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
    start_images: Callable[[Sequence[Cell], int], NDArray[np.uint8]] | None = field(default=None, compare=False)

    def all_cells(self) -> list[Cell]:
        """Return every cell once, in a fixed order."""
        parts = (*self.cells.values(), self.base_only)
        return list(dict.fromkeys(cell for part in parts for cell in part))


def vocabulary_protocol(
    vocabulary: Vocabulary,
    concepts: Sequence[str],
    settings: EvaluateSettings,
    *,
    sealed: bool = False,
    render: Render | None = None,
) -> EvaluationProtocol:
    """Return the cells that measure the erasure of each of `concepts` on a vocabulary; `render` draws start images.

    Raises ConceptError for a name that the vocabulary does not have, SplitError for a sealed one, or one among
    `settings.styles` and `settings.objects`, unless `sealed`.
    """
    cells = VocabularyCells.of(vocabulary, settings, sealed=sealed)
    start_images = None if render is None else partial(_renders, render)
    grid = cells.grid(settings.grid_rounds)
    by_concept = {name: [*grid, *cells.target(name)] for name in concepts}
    return EvaluationProtocol(by_concept, cells.held_out_grid(), vocabulary, start_images)


def _renders(render: Render, cells: Sequence[Cell], size: int) -> NDArray[np.uint8]:
    return np.stack([render(c.objects, c.style, c.seed, size) for c in cells])


def check_open(vocabulary: Vocabulary, names: Iterable[str]) -> None:
    """Raise SplitError if one of `names` is a sealed concept."""
    closed = sorted(vocabulary.sealed & set(names))
    if closed:
        raise SplitError(
            f"{', '.join(closed)}: sealed until all is frozen, so nothing may draw or read it but "
            "`neuraleraser evaluate --sealed`; pass other concepts"
        )


@dataclass(frozen=True)
class VocabularyCells:
    """Cells of a vocabulary: of some of its styles and objects, with seeds of their own."""

    vocabulary: Vocabulary
    settings: EvaluateSettings
    styles: Sequence[str]
    objects: Sequence[str]
    seeds: range
    sealed: bool

    @classmethod
    def of(cls, vocabulary: Vocabulary, settings: EvaluateSettings, *, sealed: bool = False) -> VocabularyCells:
        """Return the cells of the open styles and objects, or of those that the settings name.

        Raises SettingsError for names that the vocabulary has not, SplitError for sealed ones, unless `sealed`.
        """
        v = vocabulary
        styles = settings.styles or (v.styles if sealed else v.open_styles)
        objects = settings.objects or (v.objects if sealed else v.open_objects)
        if unknown := sorted({*styles} - {*v.styles} | {*objects} - {*v.objects}):
            raise SettingsError(f"the {v.name} has no style or object {', '.join(unknown)}: pass names that it has")
        if not sealed:
            check_open(v, (*styles, *objects))
        return cls(v, settings, styles, objects, SEALED_SEEDS if sealed else TEST_SEEDS, sealed)

    def grid(self, rounds: int, phrasing: int = 0) -> list[Cell]:
        """Return every style with every object, `rounds` times, in one of the four phrasings."""
        group = GRID if phrasing in PHRASINGS[SEEN] else HELD_OUT_GRID
        return [self._cell(group, k, s, o, phrasing) for k in range(rounds) for s in self.styles for o in self.objects]

    def held_out_grid(self) -> list[Cell]:
        """Return the grid in held-out phrasings: half of the cells in each phrasing, each cell of a round once."""
        return [
            cell
            for k, phrasing in enumerate(PHRASINGS[HELD_OUT_PHRASINGS])
            for cell in self.grid(self.settings.held_out_grid_rounds, phrasing)
            if sum(self._indices(cell.style, cell.objects[0])) % 2 == k
        ]

    def target(self, name: str) -> list[Cell]:
        """Return the cells that only the erasure of `name` needs, beside the grid: target, two objects, held-out
        phrasings, image-to-image, and fragments.

        Raises ConceptError for a name that the vocabulary does not have, SplitError for a sealed one unless `sealed`.
        """
        v, s = self.vocabulary, self.settings
        if not self.sealed:
            check_open(v, [name])
        if name in v.objects:
            pairs = [(style, name) for style in self.styles]
        elif name in v.styles:
            pairs = [(name, obj) for obj in self.objects]
        else:
            raise ConceptError(
                f"the {v.name} has no concept {name!r}, so there are no cells to measure its erasure on: "
                "pass a protocol of your own"
            )
        cells = [self._cell(TARGET, k, s, o, 0) for k in range(self.settings.target_rounds) for s, o in pairs]
        if name in v.objects:
            cells += self._two_objects(name)
        held_out = PHRASINGS[HELD_OUT_PHRASINGS]
        for k in range(s.held_out_rounds):
            # Neighbouring cells take turns, and every cell changes its phrasing from round to round.
            turns = [(pair, held_out[(sum(self._indices(*pair)) + k) % len(held_out)]) for pair in pairs]
            cells += [self._cell(HELD_OUT, k, *pair, phrasing) for pair, phrasing in turns]
        cells += [self._cell(IMAGE_TO_IMAGE, k, *pair, 0) for k in range(s.image_to_image_rounds) for pair in pairs]
        return cells + self.fragments(name)

    def fragments(self, name: str) -> list[Cell]:
        """Return cells whose prompts hold one or two words of the concept's phrasings and never a whole one: of a style
        beside an object ("a horse, swirling strokes"), of an object alone ("a picture of purring kitten").

        Each fragment comes twice, of a style beside two objects; fewer than all are a fixed choice.
        """
        v = self.vocabulary
        concepts, company = (*v.objects, *v.styles), v.open_objects
        cells = []
        for k in range(_FRAGMENT_ROUNDS):
            for i, fragment in enumerate(v.fragments(name)):
                number = _FRAGMENTS * (_FRAGMENT_ROUNDS * concepts.index(name) + k) + i
                seed = self.seeds[(_BLOCK * GROUPS.index(FRAGMENTS) + number) % len(self.seeds)]
                if name in v.styles:
                    beside = company[(3 * i + 5 * k) % len(company)]
                    prompt, objects = f"{v.object_phrases[beside][0]}, {fragment}", (beside,)
                else:
                    prompt, objects = f"a picture of {fragment}", ()
                cells.append(Cell(prompt, seed, "", objects, FRAGMENTS))
        count = min(self.settings.fragment_prompts, len(cells))
        return [cells[i] for i in sorted(random.Random(0).sample(range(len(cells)), count))]

    def _two_objects(self, name: str) -> list[Cell]:
        """Return `name` beside each other object, first and second by turns, in varied styles."""
        v, cells = self.vocabulary, []
        others = [o for o in self.objects if o != name]
        for k in range(self.settings.two_object_rounds):
            for i, other in enumerate(others):
                style = self.styles[(3 * i + 7 * k) % len(self.styles)]
                pair = (name, other) if (i + k) % 2 else (other, name)
                number = v.objects.index(name) * len(v.objects) + v.objects.index(other)
                seed = self._seed(TWO_OBJECTS, k, number)
                cells.append(Cell(v.fresh_prompt(pair, style), seed, style, pair, TWO_OBJECTS))
        return cells

    def _cell(self, group: str, round: int, style: str, name: str, phrasing: int) -> Cell:
        prompt = self.vocabulary.fresh_prompt([name], style, phrasing)
        i, j = self._indices(style, name)
        seed = self._seed(group, round, i * len(self.vocabulary.objects) + j)
        return Cell(prompt, seed, style, (name,), group)

    def _seed(self, group: str, round: int, number: int) -> int:
        in_round = len(self.vocabulary.styles) * len(self.vocabulary.objects)
        return self.seeds[(_BLOCK * GROUPS.index(group) + in_round * round + number) % len(self.seeds)]

    def _indices(self, style: str, name: str) -> tuple[int, int]:
        return self.vocabulary.styles.index(style), self.vocabulary.objects.index(name)
