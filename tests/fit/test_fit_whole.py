"""From a concept to an eraser on a model that has learnt nothing: what comes out holds together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from handmade import random
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import FileError
from neuraleraser.fit import Dictionary, fit
from neuraleraser.fit.dictionary import canvas_background, make_dictionary
from neuraleraser.fit.fitting import _lessons_beside
from neuraleraser.fit.states import recorded
from neuraleraser.models import edits_for
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site

AT = Site("unet.mid_block.attentions.0")
SAMPLING = Sampling(steps=2, batch=2)
CONCEPT = Concept("x", "other", (Pair("a x", "a"), Pair("b x", "b"), Pair("c x", "c")))
BACKGROUND = [("a", "Cats", "Van_Gogh"), ("b", "Dogs+Cats", "Rust"), ("c", "", "Seed_Images")]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def known(pipe: Any) -> Dictionary:
    return make_dictionary(pipe, *_sae(), BACKGROUND, SAMPLING)


def test_a_dictionary_there_and_back(known: Dictionary, tmp_path: Path) -> None:
    # Three images, the unconditional branch of one of them, one timestep in two.
    assert known.pooled.shape == (4, 1, 2, 40)
    assert list(known.objects) == ["Cats", "Dogs+Cats", "", "Cats"]
    known.save(tmp_path)
    back = Dictionary.load(tmp_path)
    assert back.site == AT and torch.equal(back.times, known.times)
    assert list(back.objects) == list(known.objects) and list(back.styles) == list(known.styles)
    largest = float(known.pooled.max())
    torch.testing.assert_close(back.pooled.float(), known.pooled.float(), atol=largest / 200, rtol=1e-2)
    assert torch.equal(back.sae.W_enc, known.sae.W_enc)


def test_a_damaged_dictionary(known: Dictionary, tmp_path: Path) -> None:
    known.save(tmp_path)
    data = (tmp_path / "background.safetensors").read_bytes()
    (tmp_path / "background.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError):
        Dictionary.load(tmp_path)


def test_the_whole_fit(pipe: Any, known: Dictionary, tmp_path: Path) -> None:
    base = generate(pipe, ["a x", "b"], [1, 2], SAMPLING)
    told: list[float] = []
    settings = FitSettings(pairs=3, rank=2, steps=3, batch=2)
    eraser = fit(pipe, CONCEPT, settings, lambda what, share: told.append(share), known=known, sampling=SAMPLING)
    assert told == sorted(told) and told[-1] == 1.0
    assert eraser.validation_error() is None and eraser.name == "x" and eraser.gate.site == AT
    assert eraser.header["seeds"] == [0, 2] and set(eraser.header["prompts"]) == {"a x", "b x", "c x"}
    assert torch.equal(eraser.gate.rows, known.sae.W_enc[eraser.gate.features])
    (made,) = eraser.corrections  # one, for all that the later blocks read
    assert made.sites == edits_for(pipe, AT)[0] and made.tensors["down"].shape == (1, tiny.WIDTH, 2)
    eraser.save(tmp_path / "x.safetensors")
    with attach(pipe, Eraser.load(tmp_path / "x.safetensors")):
        generate(pipe, ["a x", "b"], [1, 2], SAMPLING)
    assert (generate(pipe, ["a x", "b"], [1, 2], SAMPLING) == base).all()


def test_what_stands_beside_the_concept_is_learnt_from(pipe: Any, known: Dictionary) -> None:
    beside = (Pair("x and y", "y"), Pair("y and x", "y"), Pair("x and z", "z"), Pair("x and w", "w"))
    settings = FitSettings(pairs=3, beside=2, rank=2, steps=3, batch=2)
    alone = fit(pipe, CONCEPT, settings, known=known, sampling=SAMPLING)
    both = fit(pipe, replace(CONCEPT, beside=beside), settings, known=known, sampling=SAMPLING)
    assert both.header["seeds"] == [0, 4]  # two prompts of what stays
    assert both.header["prompts"][3:] == ["x and y", "y and x", "x and z"]
    assert both.gate.features.tolist() == alone.gate.features.tolist()  # the gate is chosen by the concept alone
    assert not torch.equal(both.corrections[0].tensors["up"], alone.corrections[0].tensors["up"])


def test_lessons_of_what_stays(pipe: Any) -> None:
    stays = {"y": ["x and y", "y and x"], "z": ["x and z"]}
    ways = _lessons_beside(pipe, stays, range(2), SAMPLING, AT)
    calls, _ = recorded(pipe, ["y", "z"], [0, 1], SAMPLING, *_sae())
    told = pipe.encode_prompt(["y and x", "x and z"], "cpu", 1, False)[0]
    assert len(ways) == 2 and len(ways[0]) == len(calls) == 2
    for lesson, call in zip(ways[1], calls, strict=True):
        assert torch.equal(lesson.call.state, call.state) and torch.equal(lesson.wanted, call.prediction)
        torch.testing.assert_close(lesson.call.conditioning["encoder_hidden_states"], told)


def _sae() -> tuple[SAE, Site]:
    w = torch.nn.functional.normalize(random(40, 32, seed=1), dim=1)
    return SAE(w, random(40, seed=2), w, 0.1 * random(32, seed=3), torch.full((40,), 0.1)), AT


def test_the_background_shows_everything_in_seen_words_only() -> None:
    from neuraleraser.canvas import words

    made = canvas_background(400, seed=0)
    assert made == canvas_background(400, seed=0) != canvas_background(400, seed=1)
    assert {style for _, _, style in made} == set(words.STYLES)
    assert {o for _, names, _ in made for o in names.split("+")} == {*words.OBJECTS, ""}
    held_out = [p for n in (*words.OBJECTS, *words.STYLES) for p in words.phrases_of(n)[words.HELD_OUT]]
    assert not [prompt for prompt, _, _ in made if any(h in prompt for h in held_out)]
