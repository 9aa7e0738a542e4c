"""Prompts and labels that show a concept."""

from __future__ import annotations

import pytest

from neuraleraser.canvas import words
from neuraleraser.concepts import Concept, Pair, canvas_concept
from neuraleraser.families.canvas import REFERENCE
from neuraleraser.fitting import Reference
from neuraleraser.fitting.background import concept_phrases, content_words, rows_without

CAT, VAN_GOGH = Concept.from_phrase("a cat"), Concept.from_phrase("Van Gogh style")
NAMELESS = frozenset[str]()


def shown(concept: Concept, prompts: list[str]) -> list[str]:
    stays = rows_without(concept, prompts, [NAMELESS] * len(prompts))
    return [prompt for i, prompt in enumerate(prompts) if i not in stays]


def test_a_concept_is_found_in_a_prompt_by_its_words() -> None:
    cats = ["a cat", "The CAT, asleep", "two cats on a roof", "the cat's bowl"]
    assert shown(CAT, [*cats, "a dog", "a cathedral", "concatenate"]) == cats
    gogh = ["a house in Van Gogh style", "Van Gogh: a bridge", "a painting by van gogh"]
    assert shown(VAN_GOGH, [*gogh, "a van", "a house in Monet style"]) == gogh


def test_phrases_are_what_a_prompt_has_and_its_match_has_not() -> None:
    assert concept_phrases(CAT) == {frozenset({"cat"})} and concept_phrases(VAN_GOGH) == {frozenset({"van", "gogh"})}
    mouse = Concept("the forbidden one", "other", (Pair("Mickey Mouse waves", "a boy waves"),))
    assert shown(mouse, ["mickey mouse in Paris", "a mouse", "a boy waves"]) == ["mickey mouse in Paris"]
    assert content_words("the style of") == {"the", "style", "of"}, "nothing but fillers: all of them"


@pytest.mark.parametrize("label", ["a cat", "cat", "Cats", "CAT"])
def test_labels_decide_where_one_names_the_concept(label: str) -> None:
    prompts, labels = ["hidden", "a cat", "a dog"], [{label, "grass"}, {"grass"}, {"dog"}]
    assert rows_without(CAT, prompts, [frozenset(names) for names in labels]) == [1, 2]
    assert rows_without(CAT, prompts, [frozenset({"grass"})] * 3) == [0, 2], "labels that do not speak of it"


def test_no_two_concepts_of_the_canvas_are_taken_for_one_another() -> None:
    names = (*words.OBJECTS, *words.STYLES)
    assert len({content_words(name) for name in names}) == len(names)
    known = Reference.load(REFERENCE)
    for name in names:
        if name != words.PLAIN:
            kept = rows_without(canvas_concept(name), known.prompts, known.labels)
            assert kept == [i for i, of in enumerate(known.labels) if name not in of] and len(kept) < len(known.labels)
