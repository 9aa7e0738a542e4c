"""The vocabulary of a world that is known: its styles and objects, their phrasings, and prompts made of them.

A benchmark needs one: it says what every prompt asks for. The canvas has one, and so has any set of styles and objects
that a model was trained to draw.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

SEEN = slice(0, 2)
"""Phrasings that erasers are made with."""
HELD_OUT = slice(2, 4)
"""Phrasings that erasers are tested with, and never made (docs/explanation/laws.md, law 12)."""
PHRASINGS = range(4)
"""Numbers of the phrasings of every style and object."""

FUNCTION_WORDS = frozenset("a an and as at between by from in into like of on style the to under with".split())
"""Words of phrasings that name nothing by themselves."""

Phrases = tuple[str, str, str, str]
"""Four phrasings: the first two are `SEEN`, the others `HELD_OUT`."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Styles and objects by name, each with four phrasings.

    name: what the world is called, for errors. empty_phrases: captions of a picture without an object. plain: the style
    of an unstyled picture, which adds no words. aliases: other names that people use, in lower case. development: names
    that defaults were set on. sealed: names that nothing is chosen on.
    """

    name: str
    object_phrases: Mapping[str, Phrases]
    style_phrases: Mapping[str, Phrases]
    empty_phrases: Phrases
    plain: str
    aliases: Mapping[str, str]
    development: frozenset[str] = frozenset()
    sealed: frozenset[str] = frozenset()

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Names of the objects."""
        return tuple(self.object_phrases)

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles, the plain one among them."""
        return tuple(self.style_phrases)

    @cached_property
    def open_objects(self) -> tuple[str, ...]:
        """Names of the objects that are not sealed."""
        return tuple(name for name in self.objects if name not in self.sealed)

    @cached_property
    def open_styles(self) -> tuple[str, ...]:
        """Names of the styles that are not sealed."""
        return tuple(name for name in self.styles if name not in self.sealed)

    def __contains__(self, name: str) -> bool:
        return name in self.object_phrases or name in self.style_phrases

    def phrases_of(self, name: str) -> Phrases:
        """Return the four phrasings of a style or object. Raises KeyError for an unknown name."""
        return self.object_phrases[name] if name in self.object_phrases else self.style_phrases[name]

    def prompt(self, objects: Sequence[str], style: str, phrasing: int = 0) -> str:
        """Return a prompt for objects in a style: "a cat and a dog in Van Gogh style".

        `phrasing` chooses one of the four for the objects and the style alike; a plain style adds no words.
        """
        what = self._what(objects, phrasing)
        return what if style == self.plain else f"{what} {self.style_phrases[style][phrasing]}"

    def fresh_prompt(self, objects: Sequence[str], style: str, phrasing: int = 0) -> str:
        """Return a prompt whose style is phrased otherwise than its objects: 'a cat as a Van Gogh painting'.

        Erasers are made with `prompt`, so the two never meet.
        """
        what = self._what(objects, phrasing)
        if style == self.plain:
            return f"a picture of {what}"
        return f"{what} {self.style_phrases[style][phrasing ^ 1]}"

    def _what(self, objects: Sequence[str], phrasing: int) -> str:
        named = " and ".join(self.object_phrases[name][phrasing] for name in objects)
        return named or self.empty_phrases[phrasing]

    def fragments(self, name: str) -> tuple[str, ...]:
        """Return one or two words of a name's phrasings, in every combination, that are no whole phrasing.

        None contains a whole phrasing of anything. Raises KeyError for an unknown name.
        """
        words = [w for text in self.phrases_of(name) for w in text.split() if w.lower() not in FUNCTION_WORDS]
        content = dict.fromkeys(words)
        every = (*content, *(f"{first} {second}" for first in content for second in content if first != second))
        return tuple(text for text in every if not self.is_named_in(text))

    def is_named_in(self, text: str) -> bool:
        """Return True if a text holds a whole phrasing of any style or object."""
        padded = f" {' '.join(text.lower().replace(',', ' , ').split())} "
        return any(phrase in padded for phrase in self._padded_phrases)

    @cached_property
    def _padded_phrases(self) -> tuple[str, ...]:
        every = {**self.object_phrases, **self.style_phrases}.values()
        return tuple(f" {text.lower()} " for phrases in every for text in phrases)

    def resolve(self, phrase: str) -> str | None:
        """Return the name that a phrase means ("Van Gogh style", "cat", "Fire"), or None."""
        text = " ".join(phrase.replace("_", " ").lower().split())
        bare = text.removesuffix(" style").removeprefix("the ").removeprefix("a ").removeprefix("an ")
        if bare in self.aliases:
            return self.aliases[bare]
        for name in (*self.styles, *self.objects):
            if bare == name.replace("_", " ").lower():
                return name
        for name, phrases in {**self.object_phrases, **self.style_phrases}.items():
            if text in {p.lower() for p in phrases} or bare in {p.lower().split(" ", 1)[-1] for p in phrases}:
                return name
        return None

    def similar_to(self, phrase: str) -> list[str]:
        """Return at most five names that sound like a phrase."""
        sounds = {name.replace("_", " ").lower(): name for name in (*self.styles, *self.objects)}
        sounds |= {text.lower(): name for name in tuple(sounds.values()) for text in self.phrases_of(name)}
        near = difflib.get_close_matches(phrase.lower(), sounds, n=5, cutoff=0.5)
        return list(dict.fromkeys(sounds[text] for text in near))


def labelled_prompts(
    vocabulary: Vocabulary, count: int, seed: int, two: float = 0.19
) -> list[tuple[str, frozenset[str]]]:
    """Return prompts of a vocabulary with the names of what they show, in seen phrasings only; 6 % of them show no
    object, and a share `two` shows two. Each shows one style, the plain one too."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        style = vocabulary.styles[i % len(vocabulary.styles)]
        r = rng.random()
        names = rng.sample(vocabulary.objects, 0 if r < 0.06 else 2 if r < 0.06 + two else 1)
        p = rng.randrange(2)
        out.append((vocabulary.prompt(names, style, p), frozenset((*names, style))))
    return out
