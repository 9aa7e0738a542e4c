"""Pictures that show a concept and pictures that lack it, each with a prompt that may say anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuraleraser.concepts import Concept
from neuraleraser.errors import DataError
from neuraleraser.families import Render, family_of
from neuraleraser.families.opening import native_side
from neuraleraser.sampling import Images, check_pictures, generate
from neuraleraser.settings import Sampling
from neuraleraser.vocabulary import Vocabulary

EMPTY_SHARE, OWN_SHARE, OTHER_SHARE = 0.7, 0.1, 0.1
"""Shares of pictures that are seen with an empty prompt, with what they show, and with another picture's prompt; the
rest are seen with words in disorder, as a learned embedding is: an attacker's prompt need not make sense."""


ALONE_SHARE = 0.6
"""Share of renders that show one object; the others show two."""


@dataclass(frozen=True)
class Pictures:
    """Pictures uint8 [N, H, W, 3], each with the prompt and the seed that it is noised with.

    generated_from: prompts that they were generated from, so that none may test what is made with them.
    """

    images: Images
    prompts: Sequence[str]
    seeds: Sequence[int]
    generated_from: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_pictures("pictures", self.images)
        n = len(self.images)
        if not 0 < n == len(self.prompts) == len(self.seeds):
            raise DataError(
                f"{n} pictures, {len(self.prompts)} prompts, {len(self.seeds)} seeds: pass one each, and some"
            )

    def __getitem__(self, rows: slice) -> Pictures:
        return Pictures(self.images[rows], self.prompts[rows], self.seeds[rows], self.generated_from)


def pictures_for(
    pipe: Any,
    concept: Concept,
    count: int,
    others: int,
    sampling: Sampling,
    seed: int = 0,
) -> tuple[Pictures, Pictures]:
    """Return `count` pictures that show a concept, and `others` that do not.

    Rendered where the family's world is known and has the concept; else the pipeline's own, of the concept's prompts
    and of their matches.
    """
    family = family_of(pipe)
    if has_renders(pipe, concept) and family.render is not None and family.vocabulary is not None:
        return _rendered(pipe, family.vocabulary, family.render, concept.name, count, others, seed)
    return _generated(pipe, concept, count, others, sampling, seed)


def has_renders(pipe: Any, concept: Concept) -> bool:
    """Return True where pictures of a concept are rendered, and so cost next to nothing."""
    family = family_of(pipe)
    return family.render is not None and family.vocabulary is not None and concept.name in family.vocabulary


def _rendered(
    pipe: Any, vocabulary: Vocabulary, render: Render, name: str, count: int, others: int, seed: int
) -> tuple[Pictures, Pictures]:
    """Return renders of a name of the vocabulary in every company, and of everything else that is not sealed."""
    size = native_side(pipe)
    rng = random.Random(seed)
    styles, objects = ([n for n in names if n != name] for names in (vocabulary.open_styles, vocabulary.open_objects))

    def draw(shows: bool, number: int, first: int) -> Pictures:
        images, own = [], []
        for i in range(number):
            shown = rng.sample(objects, 1 if rng.random() < ALONE_SHARE else 2)
            style = rng.choice(styles)
            if shows and name in vocabulary.styles:
                style = name
            elif shows:
                shown[rng.randrange(len(shown))] = name
            images.append(render(shown, style, first + i, size))
            own.append(vocabulary.prompt(shown, style, rng.randrange(2)))
        different = [vocabulary.prompt(rng.sample(objects, 1), rng.choice(styles), rng.randrange(2)) for _ in own]
        return Pictures(np.stack(images), _texts(own, different, rng), range(first, first + number))

    first = 10**6 * (1 + seed)
    return draw(True, count, first), draw(False, others, first + count)


def _generated(
    pipe: Any, concept: Concept, count: int, others: int, sampling: Sampling, seed: int
) -> tuple[Pictures, Pictures]:
    """Return the pipeline's own images of the concept's prompts, and of their matches and of what stands beside it."""
    rng = random.Random(seed)
    pairs = [*concept.pairs, *concept.context_pairs]
    found = []
    for shows, number in ((True, count), (False, others)):
        some = [pairs[i % len(pairs)] for i in rng.sample(range(max(number, len(pairs))), number)]
        own = [pair.positive if shows else pair.negative for pair in some]
        different = [rng.choice(pairs).negative for _ in own]
        seeds = range(seed + 10**6 * (2 - shows), seed + 10**6 * (2 - shows) + number)
        found.append(Pictures(generate(pipe, own, seeds, sampling), _texts(own, different, rng), seeds, own))
    return found[0], found[1]


def _texts(own: Sequence[str], others: Sequence[str], rng: random.Random) -> list[str]:
    """Return the prompt that each picture is noised with: none, its own, another's, or words in disorder."""
    texts = []
    words = [word for prompt in (*own, *others) for word in prompt.split()]
    for mine, other in zip(own, others, strict=True):
        r = rng.random()
        if r < EMPTY_SHARE:
            texts.append("")
        elif r < EMPTY_SHARE + OWN_SHARE:
            texts.append(mine)
        elif r < EMPTY_SHARE + OWN_SHARE + OTHER_SHARE:
            texts.append(other)
        else:
            texts.append(" ".join(rng.sample(words, min(len(words), rng.randint(1, 12)))))
    return texts
