"""The reference that ships says what it was made with."""

from __future__ import annotations

from neuraleraser.canvas import words
from neuraleraser.families.canvas import REFERENCE
from neuraleraser.fitting import Reference
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS


def test_the_shipped_reference_says_what_it_was_made_with() -> None:
    made = Reference.load(REFERENCE).provenance
    assert made.seeds == ((100, 499), (500, 999)) and made.phrasings == (0, 1)
    assert set(made.labels) == {*words.OBJECTS, *words.STYLES} == set(Reference.load(REFERENCE).sae.header["labels"])
    assert len(made.prompts) > 700 and set(Reference.load(REFERENCE).prompts) < set(made.prompts)
    held_out = [phrase for n in made.labels for phrase in words.VOCABULARY.phrases_of(n)[HELD_OUT_PHRASINGS]]
    assert not [prompt for prompt in made.prompts if any(phrase in prompt for phrase in held_out)]
