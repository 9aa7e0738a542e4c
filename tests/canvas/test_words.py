"""The vocabulary: names, phrasings, prompts and captions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from neuraleraser.canvas import words
from neuraleraser.canvas.words import (
    ALIASES,
    DEV_OBJECTS,
    DEV_STYLES,
    EMPTY_PHRASES,
    OBJECT_PHRASES,
    OBJECT_SUBSTITUTES,
    OBJECTS,
    PLAIN,
    STYLE_PHRASES,
    STYLES,
    caption,
)
from neuraleraser.vocabulary import FUNCTION_WORDS, HELD_OUT, SEEN

UNLEARNCANVAS_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits Sandwiches
Sea Statues Towers Trees Waterfalls
""".split()
UNLEARNCANVAS_STYLES = """
Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon Cubism
Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love Greenfield
Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel
Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Seed_Images Sketch Sponge_Dabbed Structuralism Superstring Surrealism
Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter
""".split()
# In UnlearnCanvas's data of 60 styles, but not among the 50 that its benchmark erases.
OUTSIDE_THE_BENCHMARK = {"Pointillism"}
CONCEPTS = (*OBJECTS, *STYLES)


class Scripted:
    """Stands for `random.Random`: `random()` and `choice()` answer from a script."""

    def __init__(self, draws: Sequence[float], picks: Sequence[int]) -> None:
        self.draws, self.picks = iter(draws), iter(picks)

    def random(self) -> float:
        return next(self.draws)

    def choice(self, seq: Sequence[str]) -> str:
        return seq[next(self.picks)]


def every_caption() -> set[str]:
    """All captions of one object, and those of two objects with their longest phrasings."""
    made = set()
    wordy = {o: max(range(4), key=lambda i, o=o: len(OBJECT_PHRASES[o][i].split())) for o in OBJECTS}
    subjects: list[tuple[tuple[str, ...], tuple[int, ...]]] = [((o,), (i,)) for o in OBJECTS for i in range(4)]
    subjects += [((), (i,)) for i in range(len(EMPTY_PHRASES))]
    subjects += [((a, b), (wordy[a], wordy[b])) for a, b in itertools.permutations(OBJECTS[:6], 2)]
    for objects, picks in subjects:
        made |= {caption(objects, PLAIN, Scripted((0.0, r), picks)) for r in (0.1, 0.5)}
        for style, how, r in itertools.product(STYLES, range(4), (0.1, 0.6, 0.8, 0.95)):
            draws = (0.9, r) if style == PLAIN else (r,)
            made.add(caption(objects, style, Scripted(draws, (*picks, how))))
    return made


def test_twenty_objects_and_at_least_25_styles():
    assert len(OBJECTS) == len(set(OBJECTS)) == 20
    assert len(STYLES) == len(set(STYLES)) >= 25
    assert PLAIN in STYLES and not set(OBJECTS) & set(STYLES)


def test_names_are_unlearncanvas_own():
    assert sorted(OBJECTS) == sorted(UNLEARNCANVAS_OBJECTS)
    assert set(STYLES) - set(UNLEARNCANVAS_STYLES) == OUTSIDE_THE_BENCHMARK


def test_other_names_lead_to_known_ones():
    assert OBJECT_SUBSTITUTES.keys() <= set(OBJECTS)
    assert set(ALIASES.values()) <= set(STYLES)
    assert ALIASES["fire"] == "On_Fire"  # the style; the object is Flame


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_concept_has_four_phrasings_half_of_them_held_out(name: str):
    phrases = words.VOCABULARY.phrases_of(name)
    assert len(phrases) == len({p.lower() for p in phrases}) == 4
    assert len(phrases[SEEN]) == len(phrases[HELD_OUT]) == 2
    assert not set(phrases[SEEN]) & set(phrases[HELD_OUT])
    assert {*phrases[SEEN], *phrases[HELD_OUT]} == set(phrases)


def test_no_phrasing_is_shared_by_two_concepts():
    phrases = [p.lower() for name in CONCEPTS for p in words.VOCABULARY.phrases_of(name)] + list(EMPTY_PHRASES)
    assert len(phrases) == len(set(phrases))


def test_an_unknown_name_has_no_phrasing():
    with pytest.raises(KeyError):
        words.VOCABULARY.phrases_of("Squirrels")


def test_development_concepts_are_some_of_the_concepts():
    assert len(DEV_STYLES) == 5 and set(DEV_STYLES) < set(STYLES)
    assert len(DEV_OBJECTS) == 4 and set(DEV_OBJECTS) < set(OBJECTS)
    assert not set(DEV_STYLES) & {"Van_Gogh", "Sponge_Dabbed", "Superstring", "On_Fire", PLAIN}  # the demo's
    assert "Cats" not in DEV_OBJECTS


def test_sealed_concepts_are_six_styles_and_six_objects_that_nothing_was_chosen_on():
    assert len(words.SEALED_STYLES) == len(words.SEALED_OBJECTS) == 6
    assert set(words.VOCABULARY.open_styles) | set(words.SEALED_STYLES) == set(STYLES)
    assert set(words.VOCABULARY.open_objects) | set(words.SEALED_OBJECTS) == set(OBJECTS)
    chosen_on = {*DEV_STYLES, *DEV_OBJECTS, PLAIN, "Van_Gogh", "Sponge_Dabbed", "Superstring", "On_Fire", "Cats"}
    assert not {*words.SEALED_STYLES, *words.SEALED_OBJECTS} & chosen_on


def test_a_whole_phrasing_is_known_by_its_words():
    for text in ("A Cat, in waxy strokes", "somewhere in falling snow", "falling water"):
        assert words.VOCABULARY.is_named_in(text)
    for text in ("a catamaran", "cat", "Gogh Van", "water falling", ""):
        assert not words.VOCABULARY.is_named_in(text)


def test_fragments_hold_no_whole_phrasing():
    assert words.VOCABULARY.fragments("Cats")[:7] == (
        "cat",
        "kitten",
        "purring",
        "pet",
        "feline",
        "whiskers",
        "cat kitten",
    )
    assert len(words.VOCABULARY.fragments("Cats")) == 36 and len(words.VOCABULARY.fragments("Van_Gogh")) == 81
    assert "falling water" not in words.VOCABULARY.fragments(
        "Waterfalls"
    ) and "water falling" in words.VOCABULARY.fragments("Waterfalls")
    assert not [
        text for name in CONCEPTS for text in words.VOCABULARY.fragments(name) if words.VOCABULARY.is_named_in(text)
    ]
    assert (
        not {w for name in CONCEPTS for text in words.VOCABULARY.fragments(name) for w in text.split()} & FUNCTION_WORDS
    )
    with pytest.raises(KeyError):
        words.VOCABULARY.fragments("Squirrels")


def test_the_canonical_prompt():
    assert words.VOCABULARY.prompt(["Cats"], "Van_Gogh") == "a cat in Van Gogh style"
    assert words.VOCABULARY.prompt(["Cats"], PLAIN) == "a cat"
    assert (
        words.VOCABULARY.prompt(["Cats", "Dogs"], "Winter", 3)
        == "a feline with whiskers and a loyal hound on a frosty day"
    )
    assert words.VOCABULARY.prompt([], "Rust", 1) == "nothing as a rust picture"


def test_fresh_prompts_are_never_those_that_erasers_are_made_with():
    assert words.VOCABULARY.fresh_prompt(["Cats"], "Van_Gogh") == "a cat as a Van Gogh painting"
    cells = list(itertools.product(OBJECTS, STYLES))
    made_with = {words.VOCABULARY.prompt([o], s, p) for o, s in cells for p in range(4)}
    for phrasing in range(4):
        half = SEEN if phrasing < 2 else HELD_OUT
        for o, s in cells:
            text = words.VOCABULARY.fresh_prompt([o], s, phrasing)
            assert text not in made_with and OBJECT_PHRASES[o][phrasing] in text
            assert s == PLAIN or any(p in text for p in STYLE_PHRASES[s][half])


def test_no_caption_is_empty_or_has_stray_spaces():
    for text in every_caption():
        assert text and text == " ".join(text.split()) and ", " not in (text[:2], text[-2:]), text
        assert text.isascii() and " ," not in text


def test_captions_name_their_objects_and_vary():
    rng = random.Random(0)
    made = [caption(("Cats", "Sea"), "Winter", rng) for _ in range(400)]
    assert len(set(made)) > 150
    for text in made:
        assert sum(p in text for p in OBJECT_PHRASES["Cats"]) >= 1 and any(p in text for p in OBJECT_PHRASES["Sea"])
        # The bare form drops the style's first word and keeps the rest.
        assert any(p.split(" ", 1)[1] in text for p in STYLE_PHRASES["Winter"])


def test_captions_are_a_function_of_their_generator():
    def made() -> list[str]:
        rng = random.Random(5)
        return [caption((o,), s, rng) for o in OBJECTS for s in STYLES]

    assert made() == made()


def test_most_plain_pictures_are_not_called_plain():
    rng = random.Random(1)
    plain = [caption(("Dogs",), PLAIN, rng) for _ in range(1000)]
    unnamed = sum(t.removeprefix("a picture of ") in OBJECT_PHRASES["Dogs"] for t in plain)
    assert 640 < unnamed < 760


def test_phrases_are_looked_up_in_both_tables():
    assert words.VOCABULARY.phrases_of("Cats") is words.OBJECT_PHRASES["Cats"]
    assert words.VOCABULARY.phrases_of("Rust") is words.STYLE_PHRASES["Rust"]
