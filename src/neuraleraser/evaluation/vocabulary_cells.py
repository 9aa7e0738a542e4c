"""Cells of a vocabulary: every style with every object, and what only the erasure of one of them needs.

Sealed concepts are left out, as something to erase and as something to keep, unless they are asked for (`sealed=True`,
of `evaluate --sealed` alone): measuring one concept must not reveal results on sealed ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuraleraser.attacks import WORD
from neuraleraser.errors import ConceptError, SettingsError, SplitError
from neuraleraser.evaluation.protocol import (
    ATTACK,
    CEILING,
    EMPTY,
    FRAGMENTS,
    GRID,
    GROUPS,
    HALF,
    HALF_CEILING,
    HELD_OUT,
    HELD_OUT_GRID,
    IMAGE_TO_IMAGE,
    INVERTED,
    INVERTED_CONTROL,
    LEARNED,
    LESSON,
    NEUTRAL,
    STRENGTHS,
    TARGET,
    TWO_OBJECTS,
    Cell,
    EvaluationProtocol,
    StartImage,
)
from neuraleraser.families import Render
from neuraleraser.settings import MAX_ATTACK_IMAGES, SEALED_SEEDS, TEST_SEEDS, EvaluateSettings
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import PHRASINGS, SEEN, Vocabulary

_BLOCK = 15_000  # seeds of a group; fragments take fewer than 10,000, and doctor looks at the first of the others
_FRAGMENT_ROUNDS, _FRAGMENTS = 2, 100  # companies of each fragment, and seeds of a concept in a round
_LEARNED_ROUNDS, _LESSONS = 2, 120  # images of each company of the word, and pictures that it is learned on
_LEARNED_SEEDS, _LESSON_SEEDS = 11_000, 14_000  # in the block of fragments, behind doctor's
_ATTACK_SEEDS, _ATTACKS = 9_000, 3  # in the block of the held-out grid, of which few rounds are drawn
_FEW = 4  # companies of an attack that searches for each apart

AttackForm = Literal["word", "word and name", "company"]
"""An attack's prompts: the word for what is found beside the company, the word before a prompt that names the concept,
or a few prompts of the company alone."""


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
    base_only = cells.held_out_grid() + [cell for name in concepts for cell in cells.ceilings(name)]
    lessons = {name: cells.lessons(name) for name in concepts} if settings.embedding_steps else {}
    return EvaluationProtocol(by_concept, base_only, vocabulary, start_images, lessons)


def _renders(render: Render, starts: Sequence[StartImage], size: int) -> NDArray[np.uint8]:
    return np.stack([render(start.objects, start.style, start.seed, size) for start in starts])


def learned_prompt(vocabulary: Vocabulary, name: str, style: str, obj: str, *, alone: bool) -> str:
    """Return a prompt that holds the word for `name`'s embeddings, beside the style or object of a picture, or alone:
    "a horse <learned>" and "a picture <learned>" for a style, "<learned> as a mosaic" and "a picture of <learned>"."""
    v = vocabulary
    if name in v.styles:
        return f"a picture {WORD}" if alone else f"{v.object_phrases[obj][0]} {WORD}"
    return f"a picture of {WORD}" if alone else f"{WORD} {v.style_phrases[style][0]}"


def check_open(vocabulary: Vocabulary, names: Iterable[str]) -> None:
    """Raise SplitError if one of `names` is a sealed concept."""
    closed = sorted(vocabulary.sealed & set(names))
    if closed:
        raise SplitError(
            f"{', '.join(closed)}: sealed, that is kept back for the project's last measurement, which `neuraleraser "
            "evaluate --sealed` alone makes. Pass other concepts; `doctor` looks at an eraser of any"
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
        phrasings, from start images, fragments, and learned embeddings.

        Raises ConceptError for a name that the vocabulary does not have, SplitError for a sealed one unless `sealed`.
        """
        v, s = self.vocabulary, self.settings
        pairs = self._pairs(name)
        cells = [self._cell(TARGET, k, s, o, 0) for k in range(self.settings.target_rounds) for s, o in pairs]
        if name in v.objects:
            cells += self._two_objects(name)
        held_out = PHRASINGS[HELD_OUT_PHRASINGS]
        for k in range(s.held_out_rounds):
            # Neighbouring cells take turns, and every cell changes its phrasing from round to round.
            turns = [(pair, held_out[(sum(self._indices(*pair)) + k) % len(held_out)]) for pair in pairs]
            cells += [self._cell(HELD_OUT, k, *pair, phrasing) for pair, phrasing in turns]
        cells += self._started(name, (IMAGE_TO_IMAGE, NEUTRAL, EMPTY, HALF, INVERTED))
        return cells + self.fragments(name) + self._learned(name)

    def ceilings(self, name: str) -> list[Cell]:
        """Return the cells, of the base alone, that ask for the pictures of `name` to be drawn without it, and those of
        a random denoiser. Raises as `target` does."""
        return self._started(name, (CEILING, HALF_CEILING, INVERTED_CONTROL))

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

    def lessons(self, name: str) -> list[Cell]:
        """Return what the embeddings of `name` are learned on: pictures of it in all open company by turns, each with a
        prompt that tells the company or nothing else. Raises as `target` does."""
        v, is_object = self.vocabulary, name in self.vocabulary.objects
        self._pairs(name)  # which raises
        company = [other for other in (v.open_styles if is_object else v.open_objects) if other != name]
        cells = []
        for i in range(_LESSONS):
            turn, k = divmod(i, len(company))
            style, obj = (company[k], name) if is_object else (name, company[k])
            prompt = learned_prompt(v, name, style, obj, alone=turn % 2 == 1)
            cells.append(Cell(prompt, self._seed(FRAGMENTS, 0, _LESSON_SEEDS + i), style, (obj,), LESSON))
        return cells

    def attacked(self, name: str, attack: str, number: int, count: int, form: AttackForm) -> list[Cell]:
        """Return `count` cells of an attack on `name`, in all company by turns; each `number` (0 to 2) has seeds of its
        own. Raises as `target` does."""
        v, is_object = self.vocabulary, name in self.vocabulary.objects
        pairs, cells = self._pairs(name), []
        if form == "company":
            pairs = pairs[:: -(-len(pairs) // _FEW)]
        first = _ATTACK_SEEDS + MAX_ATTACK_IMAGES * (_ATTACKS * (*v.objects, *v.styles).index(name) + number)
        for k in range(count):
            style, obj = pairs[k % len(pairs)]
            own = (style, (obj,)) if form == "word and name" else (style, ()) if is_object else ("", (obj,))
            if form == "word":
                prompt = learned_prompt(v, name, style, obj, alone=False)
            elif form == "word and name":
                prompt = f"{WORD} {v.fresh_prompt((obj,), style)}"
            else:
                prompt = v.fresh_prompt((), style) if is_object else v.fresh_prompt((obj,), v.plain)
            cells.append(Cell(prompt, self._seed(HELD_OUT_GRID, 0, first + k), *own, f"{ATTACK}{attack}"))
        return cells

    def _learned(self, name: str) -> list[Cell]:
        """Return cells whose prompts hold the word for the embeddings of `name`: of a style beside an object, of an
        object alone; none if no steps are made to learn them."""
        v, is_object = self.vocabulary, name in self.vocabulary.objects
        cells = []
        for k in range(_LEARNED_ROUNDS if self.settings.embedding_steps else 0):
            for style, obj in self._pairs(name):
                i, j = self._indices(style, obj)
                number = _LEARNED_SEEDS + i * len(v.objects) + j
                prompt = learned_prompt(v, name, style, obj, alone=is_object)
                seed = self._seed(FRAGMENTS, 2 * k + is_object, number)
                cells.append(Cell(prompt, seed, "", () if is_object else (obj,), LEARNED, learned=name))
        return cells

    def _pairs(self, name: str) -> list[tuple[str, str]]:
        """Return every (style, object) that `name` is one of. Raises as `target` does."""
        v = self.vocabulary
        if not self.sealed:
            check_open(v, [name])
        if name in v.objects:
            return [(style, name) for style in self.styles]
        if name in v.styles:
            return [(name, obj) for obj in self.objects]
        raise ConceptError(
            f"the {v.name} has no concept {name!r}, so there are no cells to measure its erasure on: "
            "pass a protocol of your own"
        )

    def _started(self, name: str, groups: Sequence[str]) -> list[Cell]:
        """Return the cells of these groups, all of which start from the same pictures of `name`.

        Strengths take turns; where the first is due, half of the picture is drawn anew as well, the left and the right
        by turns, and its latents are inverted.
        """
        cells, whole = [], (IMAGE_TO_IMAGE, NEUTRAL, EMPTY, CEILING)
        for k in range(self.settings.start_image_rounds):
            for style, obj in self._pairs(name):
                turn = sum(self._indices(style, obj)) + k
                named = self._cell(IMAGE_TO_IMAGE, k, style, obj, 0)
                start = StartImage(style, (obj,), named.seed, STRENGTHS[turn % len(STRENGTHS)])
                half = replace(start, strength=1.0, half="left" if (turn // len(STRENGTHS)) % 2 else "right")
                for group in groups:
                    if group == IMAGE_TO_IMAGE:
                        cells.append(replace(named, start_image=start))
                    elif group in whole:
                        cells.append(self._without(name, group, k, start))
                    elif start.strength == STRENGTHS[0]:
                        cells.append(self._without(name, group, k, half))
        return cells

    def _without(self, name: str, group: str, round: int, start: StartImage) -> Cell:
        """Return a cell whose prompt does not ask for `name`, which its start image shows: of the other domain alone,
        or of nothing."""
        v, (obj,) = self.vocabulary, start.objects
        i, j = self._indices(start.style, obj)
        # Cells of a style and of an object start from the same picture, with other prompts and so with other seeds.
        number, is_object = i * len(v.objects) + j, name in v.objects
        if group in (INVERTED, INVERTED_CONTROL):  # once in three rounds, and the last block of seeds is short
            turn = 4 * (round // len(STRENGTHS)) + 2 * (group == INVERTED_CONTROL) + is_object
            seed = self._seed(INVERTED, turn, number)
        else:
            seed = self._seed(group, 2 * round + is_object, number)
        if group in (EMPTY, INVERTED, INVERTED_CONTROL):
            return Cell("", seed, "", (), group, start)
        style, objects = (start.style, ()) if is_object else (v.plain, start.objects)
        if group in (NEUTRAL, HALF):
            prompt = v.fresh_prompt(objects, style)
        elif style == v.plain and objects:
            prompt = f"{v.prompt(objects, style)} {v.style_phrases[style][0]}"  # asked for in so many words
        else:
            prompt = v.prompt(objects, style)
        return Cell(prompt, seed, style, objects, group, start)

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
