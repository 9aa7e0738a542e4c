"""Tell which prompts and labels show a concept, by their words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neuraleraser.concepts import Concept

_FILLERS = frozenset(
    "a an the in on of as at by with and to from like some "
    "style styles painting paintings drawing drawings picture pictures photo photograph image".split()
)
"""Words that name no concept by themselves."""


def rows_without(concept: Concept, prompts: Sequence[str], labels: Sequence[frozenset[str]]) -> list[int]:
    """Return the numbers of the rows that do not show the concept, from each row's prompt and the names it shows.

    Where some row is labelled with the concept's name the labels decide. Else a row shows the concept if its prompt has
    all words of one of the concept's phrases. That drops a few rows too many ("a red ball beside a car" for "a red
    car"), which costs little; a row that shows the concept and counts as background would shut the gate.
    """
    name = content_words(concept.name)
    named = [any(content_words(label) == name for label in shown) for shown in labels]
    if any(named):
        return [row for row, shows in enumerate(named) if not shows]
    phrases = concept_phrases(concept)
    return [row for row, prompt in enumerate(prompts) if not _has_phrase(prompt, phrases)]


def concept_phrases(concept: Concept) -> set[frozenset[str]]:
    """Return the content words of the concept's phrases: of its name, and of what each of its prompts has in place of
    its match's words ("a cat" of "a cat in a forest" and "an empty scene in a forest")."""
    phrases = {content_words(concept.name)}
    for pair in concept.pairs:
        shows, without = pair.positive.split(), pair.negative.split()
        while shows and without and shows[0] == without[0]:
            shows, without = shows[1:], without[1:]
        while shows and without and shows[-1] == without[-1]:
            shows, without = shows[:-1], without[:-1]
        phrases.add(content_words(" ".join(shows)))
    return phrases - {frozenset()}


def content_words(text: str) -> frozenset[str]:
    """Return the words of `text` that name something: in lower case, without punctuation, a plural's s and fillers
    ("Van_Gogh style" -> {"van", "gogh"}); all its words where that leaves none."""
    words = "".join(c if c.isalnum() else " " for c in text.lower().replace("'s", "")).split()
    bare = {word.removesuffix("s") if len(word) > 3 else word for word in words}
    return frozenset(bare - _FILLERS or bare)


def _has_phrase(prompt: str, phrases: Iterable[frozenset[str]]) -> bool:
    words = content_words(prompt)
    return any(phrase <= words for phrase in phrases)
