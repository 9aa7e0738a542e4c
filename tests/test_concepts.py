"""Concepts: phrases, pairs that differ in one thing, files, and scores against plain counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuraleraser.canvas import words
from neuraleraser.concepts import MAX_FILE_BYTES, Concept, Pair, add_context_pairs, canvas_concept
from neuraleraser.errors import ConceptError
from neuraleraser.evaluation.vocabulary_cells import VocabularyCells
from neuraleraser.sae.scores import Profile, margin_score, profile, saeuron_score
from neuraleraser.settings import EvaluateSettings
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import SEEN

NAMES = [n for n in (*words.STYLES, *words.OBJECTS) if n != words.PLAIN]


@pytest.mark.parametrize("name", NAMES)
def test_every_phrasing_finds_its_concept(name: str) -> None:
    for phrase in (name, name.replace("_", " "), name.lower(), f"the {name}", *words.VOCABULARY.phrases_of(name)):
        assert words.VOCABULARY.resolve(phrase) == name, phrase
        assert words.VOCABULARY.resolve(f"  {phrase.upper()} ") == name, phrase


def test_what_is_meant_by_common_words() -> None:
    assert (
        words.VOCABULARY.resolve("Van Gogh style") == "Van_Gogh"
        and words.VOCABULARY.resolve("cat") == "Cats"
        and words.VOCABULARY.resolve("the sea") == "Sea"
    )
    assert words.VOCABULARY.resolve("Fire") == "On_Fire" and words.VOCABULARY.resolve("a flame") == "Flame"
    for phrase in ("", " ", "a", "the", "style", "Picasso", "a carburettor", "concatenate"):
        assert words.VOCABULARY.resolve(phrase) is None, phrase


@given(st.text(max_size=30))
def test_any_phrase_is_a_name_or_none(phrase: str) -> None:
    assert words.VOCABULARY.resolve(phrase) in {None, words.PLAIN, *NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_match_lacks_the_concept_and_nothing_else(name: str) -> None:
    concept = canvas_concept(name)
    mine = [p for p in words.VOCABULARY.phrases_of(name)[SEEN]]
    assert concept.name == name and concept.kind == ("style" if name in words.STYLES else "object")
    for pair in concept.pairs:
        assert any(p in pair.positive for p in mine) and not any(p in pair.negative.split(" and ") for p in mine)
        if concept.kind == "style":
            assert pair.negative in pair.positive
        else:
            style = next(
                (p for s in words.STYLES for p in words.VOCABULARY.phrases_of(s) if pair.positive.endswith(p)), ""
            )
            assert pair.negative.endswith(style)
    held_out = words.VOCABULARY.phrases_of(name)[HELD_OUT_PHRASINGS]
    assert not [p for p in concept.pairs if any(h in p.positive for h in held_out)]
    assert {p.positive for p in canvas_concept(name, HELD_OUT_PHRASINGS).pairs}.isdisjoint(
        p.positive for p in concept.pairs
    )


@pytest.mark.parametrize("name", ["Picasso", words.PLAIN, ""])
def test_an_unknown_concept_names_those_that_are_known(name: str) -> None:
    with pytest.raises(ConceptError, match="Van_Gogh") as caught:
        canvas_concept(name)
    assert words.PLAIN not in str(caught.value).split("It knows")[1]


@pytest.mark.parametrize(
    ("phrase", "kind"),
    [
        ("Van Gogh style", "style"),
        ("an oil painting", "style"),
        ("Pop Art", "style"),
        ("a cart", "object"),
        ("a heart", "object"),
        ("Bart Simpson", "object"),
        ("a stylish hat", "object"),
        ("a party", "object"),
    ],
)
def test_the_kind_of_a_phrase(phrase: str, kind: str) -> None:
    assert Concept.from_phrase(phrase).kind == kind
    assert Concept.from_phrase(phrase, kind="object").kind == "object"


@pytest.mark.parametrize("name", words.OBJECTS)
def test_what_stands_beside_an_object_stays(name: str) -> None:
    beside, held_out = (
        canvas_concept(name).context_pairs,
        [p for o in words.OBJECTS for p in words.VOCABULARY.phrases_of(o)[HELD_OUT_PHRASINGS]],
    )
    tests = {
        c.prompt
        for c in VocabularyCells.of(words.VOCABULARY, EvaluateSettings(two_object_rounds=25), sealed=True).target(name)
    }
    mine, seen = words.OBJECT_PHRASES[name][SEEN], set[tuple[str, str]]()
    for pair in beside:
        (what,) = [p for p in mine if f"{p} and " in pair.positive or f" and {p}" in pair.positive]
        assert pair.positive.replace(f"{what} and ", "").replace(f" and {what}", "") == pair.negative
        assert not any(h in pair.positive for h in held_out) and pair.positive not in tests
    for without in list(dict.fromkeys(pair.negative for pair in beside))[:36]:  # as many as a fit draws
        seen |= {("object", o) for o in words.OBJECTS if without.startswith(words.OBJECT_PHRASES[o][:2])}
        seen |= {("style", s) for s in words.STYLES if without.endswith(words.STYLE_PHRASES[s][:2])}
    assert (
        len([o for kind, o in seen if kind == "object"]) == 19 and len([s for kind, s in seen if kind == "style"]) >= 23
    )
    assert not canvas_concept("Van_Gogh").context_pairs


def test_neighbours_stand_beside_a_phrase() -> None:
    cat, near = (
        Concept.from_phrase("a cat"),
        [Concept.from_phrase("a dog"), Concept.from_phrase("a red fox"), Concept.from_phrase("Monet style")],
    )
    beside = add_context_pairs(cat, near).context_pairs
    assert Pair("a cat and a dog in a forest", "a dog in a forest") in beside
    assert Pair("a red fox and a cat", "a red fox") in beside
    assert {p.negative.split(" in ")[0] for p in beside} >= {"a dog", "a red fox"} and len(set(beside)) == len(beside)
    assert {p.negative for p in beside[:4]} >= {"a dog"} and not any("Monet" in p.positive for p in beside)
    style, cats = Concept.from_phrase("Van Gogh style"), canvas_concept("Cats")
    for concept in (style, cats, Concept("cats", "object", cat.pairs)):
        assert add_context_pairs(concept, near) == concept  # no object, already has some, or not named in its prompts
    assert add_context_pairs(cat, near[2:]) == cat


def test_pairs_of_a_phrase() -> None:
    cat = Concept.from_phrase("  a   cat ", instead="a dog")
    assert (
        cat.name == "a cat"
        and Pair("a cat at night", "a dog at night") in cat.pairs
        and cat.pairs[0].positive == "a cat"
    )
    style = Concept.from_phrase("Van Gogh style")
    assert all(p.positive != p.negative and p.negative in p.positive for p in style.pairs)
    with pytest.raises(ConceptError, match="empty phrase"):
        Concept.from_phrase("  ")
    with pytest.raises(ConceptError, match="its own match"):
        Concept.from_phrase("a cat", instead="a cat")
    with pytest.raises(ConceptError, match="of kind 'thing'"):
        Concept.from_phrase("a cat", kind="thing")


def test_a_concept_has_pairs_that_differ() -> None:
    with pytest.raises(ConceptError, match="no prompts"):
        Concept("x", "other", ())
    with pytest.raises(ConceptError, match="its own match"):
        Concept("x", "other", (Pair("a", " a "),))


# Files.

GOOD: dict[str, Any] = {"name": "logo", "kind": "object", "pairs": [["a logo", "a wall"], ["my logo", "my wall"]]}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "concept.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_concept_from_a_file(tmp_path: Path) -> None:
    assert Concept.from_json(written(tmp_path, GOOD)) == Concept(
        "logo", "object", (Pair("a logo", "a wall"), Pair("my logo", "my wall"))
    )
    beside = Concept.from_json(
        written(tmp_path, {**GOOD, "context_pairs": [["a logo and a clock", "a clock"]]})
    ).context_pairs
    assert beside == (Pair("a logo and a clock", "a clock"),)
    assert Concept.from_json(written(tmp_path, {**GOOD, "hard_negatives": ["a sign"]})).hard_negatives == ("a sign",)
    umlaut = {**GOOD, "name": "Bücher", "pairs": [["ein Märchen", "nichts"]]}
    assert Concept.from_json(written(tmp_path, json.dumps(umlaut, ensure_ascii=False).encode())).name == "Bücher"
    assert Concept.from_json(written(tmp_path, {k: v for k, v in GOOD.items() if k != "kind"})).kind == "other"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'"' + b"x" * MAX_FILE_BYTES + b'"',
        [],
        "text",
        5,
        None,
        {},
        {**GOOD, "name": 5},
        {**GOOD, "name": None},
        {**GOOD, "kind": "thing"},
        {**GOOD, "kind": ["object"]},
        {**GOOD, "pairs": []},
        {**GOOD, "pairs": 5},
        {**GOOD, "pairs": ["ab", "cd"]},
        {**GOOD, "pairs": "ab"},
        {**GOOD, "pairs": {"a": "b"}},
        {**GOOD, "pairs": [["a"]]},
        {**GOOD, "pairs": [["a", "b", "c"]]},
        {**GOOD, "pairs": [["a", None]]},
        {**GOOD, "pairs": [["a", {"b": 1}]]},
        {**GOOD, "pairs": [["a", "a"]]},
        {**GOOD, "context_pairs": 5},
        {**GOOD, "context_pairs": [["a and b", "a and b"]]},
        {**GOOD, "hard_negatives": "a sign"},
        {**GOOD, "hard_negatives": ["a sign", 5]},
        {**GOOD, "hard_negatives": ["a sign", "a logo"]},
        {**GOOD, "hard_negatives": ["a\x00sign"]},
    ],
    ids=range(29),
)
def test_files_that_are_no_concept(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ConceptError) as caught:
        Concept.from_json(written(tmp_path, content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ([1], "it holds [1] and no object"),
        ({"name": "x"}, "field pairs is missing"),
        ({**GOOD, "kind": 5}, "field kind is 5 and no text"),
        ({**GOOD, "pairs": [["a", "b", "c"]]}, "field pairs has ['a', 'b', 'c'], which is no pair of two texts"),
        ({**GOOD, "context_pairs": {}}, "field context_pairs is {} and no list"),
        ({**GOOD, "more": 1}, "field more is unknown"),
    ],
    ids=range(6),
)
def test_the_message_says_which_field(content: Any, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptError) as caught:
        Concept.from_json(written(tmp_path, content))
    assert f"concept.json: {wrong}; expected " in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="no readable JSON"):
        Concept.from_json(tmp_path / "none.json")


# Scores.


def test_a_profile_counts() -> None:
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = ["b", "a", "b", "a", "c", "b"]
    p = profile(x.half(), torch.tensor([1.0, 2.0]), labels)
    assert p.names == ("b", "a", "c") and p.mean.shape == p.spread.shape == (3, 2, 3)
    torch.testing.assert_close(p.mean[0], x[[0, 2, 5]].mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(p.spread[1], (x[1] - x[3]).abs() / 2, atol=1e-3, rtol=1e-2)
    assert not p.spread[2].any()  # one image
    for bad in (labels[:-1], labels * 2):
        with pytest.raises(ConceptError, match="expected"):
            profile(x, torch.tensor([1.0, 2.0]), bad)
    with pytest.raises(ConceptError, match="3 times"):
        profile(x, torch.arange(3), labels)


def scores_of(mean: list[list[float]], spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    m = torch.tensor(mean).unsqueeze(1)  # concepts, one time, features
    p = Profile(tuple("abc"[: len(mean)]), torch.tensor([0.0]), m, torch.full_like(m, spread))
    return saeuron_score(p, "a")[0], margin_score(p, "a")[0]


def test_a_neighbour_that_shares_a_feature_sinks_its_score() -> None:
    # Feature 0 is a's own, 1 is shared with b alone, 2 fires for all, 3 for none, 4 for the others.
    shared, gap = scores_of([[3.0, 3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0, 1.0]])
    assert gap.argmax() == 0 and gap[1] == 0 and gap[3] == 0 and gap[4] < 0
    assert shared[1] > shared[2]  # the share score does not see that b has it too as clearly
    assert shared.argmax() == 0 and shared[3] == 0 and shared[4] < 0


def test_the_share_score_by_hand() -> None:
    shared, _ = scores_of([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]])
    torch.testing.assert_close(shared, torch.tensor([1 / 4 - 1 / 4, 3 / 4 - 3 / 4]), atol=1e-6, rtol=0)
    shared, _ = scores_of([[1.0, 3.0], [3.0, 1.0]])
    torch.testing.assert_close(shared, torch.tensor([-0.5, 0.5]))


def test_the_neighbour_score_by_hand() -> None:
    _, gap = scores_of([[1.0, 5.0], [0.5, 1.0], [0.0, 2.0]], spread=0.25)
    torch.testing.assert_close(gap, torch.tensor([0.5 / 0.505, 3 / 0.505]))


def test_features_that_never_fire_score_zero() -> None:
    shared, gap = scores_of([[0.0, 0.0], [0.0, 0.0]], spread=0.0)
    assert not shared.any() and not gap.any()


@pytest.mark.parametrize("score", [saeuron_score, margin_score])
def test_scores_need_the_concept_and_another(score: Any) -> None:
    p = profile(torch.rand(2, 1, 3), torch.tensor([0.0]), ["a", "b"])
    with pytest.raises(ConceptError, match="cannot score 'c'"):
        score(p, "c")
    with pytest.raises(ConceptError, match="one other"):
        score(profile(torch.rand(2, 1, 3), torch.tensor([0.0]), ["a", "a"]), "a")
