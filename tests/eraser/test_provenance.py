"""What a reference was made with goes along with it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from helpers.headers import provenances
from neuraleraser.eraser.provenance import MAX_PROMPTS, Provenance, prompt_digest

MADE = Provenance(((0, 3), (9, 9)), ("a cat", "a dog"), (0, 1), ("Cats",), "theirs")


@given(provenances)
def test_what_is_written_is_read(made: Provenance) -> None:
    written = made.as_json()
    assert Provenance.parse(json.loads(json.dumps(written))) == made
    assert Provenance.parse(written).as_json() == written


def test_many_prompts_are_digests() -> None:
    assert MADE.in_short() is MADE, "few prompts are kept as text"
    many = replace(MADE, prompts=tuple(f"prompt {i}" for i in range(MAX_PROMPTS + 1)))
    short = many.in_short()
    assert list(short.prompt_digests) == sorted(prompt_digest(p) for p in many.prompts)
    assert not short.prompts and "prompts" not in short.as_json()
    assert prompt_digest("prompt 7") in short.prompt_digests and prompt_digest("another") not in short.prompt_digests


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [[1]]},
        {"seeds": [[2, 1]]},
        {"seeds": [["1", "2"]]},
        {"seeds": [[0, 10**300]]},
        {"seeds": 3},
        {"prompts": [1]},
        {"prompts": "a cat"},
        {"prompts": ["\x00"]},
        {"labels": None},
        {"phrasings": ["x"]},
        {"phrasings": [True]},
        {"sae": 1},
        {"prompts_sha256": "a cat"},
        {"prompts_sha256": ["01234567"]},
        {"more": 1},
    ],
    ids=lambda change: f"{change!a:.30}",
)
def test_what_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|cannot be read"):
        Provenance.parse({**MADE.as_json(), **change})


@pytest.mark.parametrize("name", MADE.as_json())
def test_a_field_that_is_missing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected|cannot be read"):
        Provenance.parse({field: value for field, value in MADE.as_json().items() if field != name})
