"""Facts about an eraser's gates, in words: they follow its header and its parts, and claim no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers import pipelines
from helpers.erasers import make_eraser, with_picture
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.eraser.sight import ROUTE_WORDS, features_text, routes_text, seen_by_noise, seen_text, sight_rows
from neuraleraser.settings import FitSettings
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES, ROUTES


@pytest.fixture(scope="module")
def eraser() -> Eraser:
    made = with_picture(make_eraser(), pipelines.stable_diffusion(), window=3)
    header = replace(made.header, routes=(*PROMPT_ROUTES, *IMAGE_ROUTES), image_separation=(0.0, 0.86))
    return replace(made, header=header)


@pytest.mark.parametrize("routes", [PROMPT_ROUTES, (*PROMPT_ROUTES, *IMAGE_ROUTES), ROUTES, ()])
def test_every_route_is_either_seen_or_not(routes: tuple[str, ...]) -> None:
    assert set(ROUTE_WORDS) == set(ROUTES)
    text = routes_text(EraserHeader("Cats", routes=routes))
    seen, _, unseen = text.partition("They are not made to see")
    for route in ROUTES:
        assert (ROUTE_WORDS[route] in seen, ROUTE_WORDS[route] in unseen) == (route in routes, route not in routes)
    assert "learned" in text and "inverted" in text  # no route stands for them


def test_where_features_come_from(eraser: Eraser) -> None:
    prompt, picture = eraser.parts
    assert features_text(prompt, eraser.header).endswith("the header names no labels that they were set with")
    labelled: dict[str, Any] = {"labels": ["Cats"]}
    assert features_text(prompt, replace(eraser.header, sae=labelled)) == "3 features of an SAE, set with labels: Cats"
    for strange in ("Cats", 5, [], None):
        assert "names no labels" in features_text(prompt, replace(eraser.header, sae={"labels": strange}))
    assert features_text(picture, replace(eraser.header, sae=labelled)).startswith("3 features, learnt with labels")


def test_levels_of_noise_go_from_the_noisiest(eraser: Eraser) -> None:
    gate = eraser.parts[1].gate
    assert seen_by_noise(gate, eraser.header) == [(750.0, 0.0), (250.0, 0.86)]
    assert seen_text(gate, eraser.header).endswith("with; shut at t = 750")
    assert seen_text(gate, eraser.header).startswith("t = 250 in 86% of the concept's pictures")
    never = replace(eraser.header, image_separation=(0.0, 0.0))
    assert seen_text(gate, never) == "no level of noise; shut at t = 750, 250"
    for shares in ((), (0.5,)):  # of another gate, or not said
        assert seen_text(gate, replace(eraser.header, image_separation=shares)) == "not said"


def test_rows_of_both_parts(eraser: Eraser) -> None:
    rows = dict(sight_rows(eraser.parts, eraser.header))
    assert rows["prompt gate"] == f"{eraser.gate.site}, one position at a time"
    assert rows["image gate"].endswith("windows of 3 x 3 positions") and "86%" in rows["image gate: opens at"]
    assert rows["guided correction"] == "from 'a' to 'b', weight 0.5"
    assert "two more forwards" in rows["guided correction: cost"]
    assert not any("false_openings" in name for name in rows)
    told = replace(eraser.header, settings=FitSettings(), tradeoff=((0.0, 0.875, 0.0), (0.01, 1.0, 0.0125)))
    found = dict(sight_rows(eraser.parts, told))
    assert found["prompt gate: false_openings"].startswith("made with 0.005")
    assert found["prompt gate: with 0"] == (
        "would open on 87.5% of its 24 own images with the concept, 0.0% of those without"
    )
    assert found["prompt gate: with 0.01"].startswith("would open on 100.0%")
    assert rows["start images"] == "no strength is known at which they lose the concept"
    known = dict(sight_rows(eraser.parts, replace(eraser.header, least_strength=0.6)))
    assert "from strength 0.6 on" in known["start images"]
    never = dict(sight_rows(eraser.parts, replace(eraser.header, least_strength=1.0)))
    assert "kept the concept at each strength" in never["start images"]
    card = eraser.generate_model_card("someone/cats").text
    assert "windows of 3 x 3 positions" in card and "two more forwards" in card and "86%" in card
    assert "They are not made to see what comes in by a control image" in card
    assert "image gate" not in dict(sight_rows(make_eraser().parts, make_eraser().header))
