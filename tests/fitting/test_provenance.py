"""What a reference was made with goes along with it."""

from __future__ import annotations

import pytest

from neuraleraser.canvas import words
from neuraleraser.families.canvas import REFERENCE
from neuraleraser.fitting import Reference
from neuraleraser.fitting.provenance import MAX_PROMPTS, Provenance, prompt_digest
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS


def test_what_a_reference_was_made_with_goes_along() -> None:
    made = Provenance(((0, 3), (9, 9)), ("a cat", "a dog"), (0, 1), ("Cats",), "theirs")
    assert Provenance.parse(made.in_full()) == made
    assert made.in_short() == made.in_full(), "few prompts are kept as text"
    many = Provenance(((0, 3),), tuple(f"prompt {i}" for i in range(MAX_PROMPTS + 1)))
    short = many.in_short()
    digests = short["prompts_sha256"].split()
    assert "prompts" not in short and digests == sorted(prompt_digest(p) for p in many.prompts)
    assert prompt_digest("prompt 7") in digests and prompt_digest("another") not in digests
    for damage in ({"seeds": [[1]]}, {"seeds": 3}, {"prompts": [1]}, {"labels": None}, {"phrasings": ["x"]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Provenance.parse({**made.in_full(), **damage})


def test_the_shipped_reference_says_what_it_was_made_with() -> None:
    made = Reference.load(REFERENCE).provenance
    assert made.seeds == ((100, 499), (500, 999)) and made.phrasings == (0, 1)
    assert set(made.labels) == {*words.OBJECTS, *words.STYLES} == set(Reference.load(REFERENCE).sae.header["labels"])
    assert len(made.prompts) > 700 and set(Reference.load(REFERENCE).prompts) < set(made.prompts)
    held_out = [phrase for n in made.labels for phrase in words.VOCABULARY.phrases_of(n)[HELD_OUT_PHRASINGS]]
    assert not [prompt for prompt in made.prompts if any(phrase in prompt for phrase in held_out)]
