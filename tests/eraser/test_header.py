"""Fields of an eraser's header that are read: each of its kind, or the file is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from helpers import pipelines
from helpers.erasers import make_eraser
from helpers.headers import headers
from neuraleraser.eraser import Eraser, EraserHeader, attach
from neuraleraser.errors import DataError, FileError, SiteError
from neuraleraser.io import tensor_file
from neuraleraser.sites import Site, made_for
from neuraleraser.sites.fingerprint import find_difference

WRONG: list[tuple[str, Any]] = [
    ("concept", ""),
    ("concept", " "),
    ("concept", "a\nb"),
    ("concept", "\x1b[31mred"),
    ("concept", "\u202ecba"),
    ("concept", "x" * 101),
    ("concept", ["Cats"]),
    ("concept", None),
    ("kind", "person"),
    ("kind", ["style"]),
    ("kind", None),
    ("base", 5),
    ("base", "x\ny"),
    ("prompts", "a cat"),
    ("prompts", ["a cat", 5]),
    ("prompts", ["\x00"]),
    ("seeds", [0]),
    ("seeds", [5, 4]),
    ("seeds", [-1, 4]),
    ("seeds", [0, 1.5]),
    ("seeds", [0, 10**300]),
    ("seeds", {"first": 0}),
    ("seconds", "12"),
    ("seconds", -1),
    ("seconds", 10**400),
    ("peak_bytes", 1.5),
    ("peak_bytes", -1),
    ("peak_bytes", 2**63),
    ("open_share", "most"),
    ("method", 5),
    ("method", "a\nb"),
    ("open_share", 1.5),
    ("routes", "named"),
    ("routes", ["by post"]),
    ("routes", [["named"]]),
    ("time_scale", 1000),
    ("settings", []),
    ("settings", {"rank": 0}),
    ("settings", {"rank": True}),
    ("settings", {"rank": "8"}),
    ("settings", {"ranks": 8}),
    ("settings", {"seed": 10**9}),
    ("sampling", 7),
    ("sampling", {"num_inference_steps": 0}),
    ("sampling", {"num_inference_steps": 10**9}),
    ("sampling", {"num_inference_steps": 2.5}),
    ("sampling", {"guidance_scale": "3"}),
    ("sampling", {"guidance_scale": -1}),
    ("sampling", {"height": -8, "width": -8}),
    ("sampling", {"height": 10**9, "width": 10**9}),
    ("sampling", {"pad_last_batch": 1}),
    ("sampling", {"strength": 9}),
    ("sampling", {"more": []}),
    ("separation", 1),
    ("separation", ["most"]),
    ("image_separation", "most"),
    ("tradeoff", [[0.1, 0.2]]),
    ("tradeoff", [[0.1, 0.2, 1.2]]),
    ("tradeoff", 0.1),
    ("least_strength", 1.5),
    ("separation", [10**400]),
    ("text_left", 1.5),
    ("reference", "none"),
    ("reference", {}),
    ("reference", {"seeds": [7], "prompts": [], "phrasings": [], "labels": [], "sae": ""}),
    ("sae", "saelens"),
    ("measured", "a lot"),
    ("calibrated", 1.0),
    ("calibrated", {}),
    ("calibrated", {"prompts": 2.5, "separation": [], "open_share": 1}),
    ("calibrated", {"prompts": 2, "separation": [None], "open_share": 1}),
    ("calibrated", {"prompts": 2, "separation": [], "open_share": 2}),
    ("made_for", []),
    ("made_for", {"class": 5}),
    ("made_for", {"class": "x\ny"}),
    ("made_for", {"weights": []}),
    ("made_for", {"weights": {"a": [1, 2, 3]}}),
    ("made_for", {"weights": {"a": [1, 2, 3, "4"]}}),
    ("made_for", {"weights": {"a": [1, 2, 3, 10**400]}}),
    ("made_for", {"weights": {"a": [1, 2, 3, True]}}),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{f} {v!a:.30}" for f, v in WRONG])
def test_a_field_that_cannot_be(field: str, value: Any, tmp_path: Path):
    make_eraser().save(tmp_path / "x")
    tensors, header = tensor_file.load(tmp_path / "x", "eraser")
    tensor_file.save(tmp_path / "x", "eraser", tensors, {**header, field: value})
    with pytest.raises(FileError, match=f"field {field}") as caught:
        Eraser.load(tmp_path / "x")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(ValueError, match=f"field {field}"):
        EraserHeader.parse({"concept": "Cats", field: value})


BY_HAND = [case for case in WRONG if case != ("kind", None)]  # which is the default: no file says it


@pytest.mark.parametrize(("field", "value"), BY_HAND, ids=[f"{f} {v!a:.30}" for f, v in BY_HAND])
def test_a_header_made_by_hand_is_refused_too(field: str, value: Any, tmp_path: Path):
    e = make_eraser()
    bad = replace(e, header=replace(e.header, **{field: value}))
    assert f"field {field}" in (bad.header.validation_error() or "")
    with pytest.raises(DataError, match="was not written"):
        bad.save(tmp_path / "x")
    with pytest.raises(DataError), attach(pipelines.stable_diffusion(), bad):
        pass


@pytest.mark.parametrize("name", ["concept", "seeds", "gate", "corrections"])
def test_what_has_a_place_of_its_own_is_nothing_more(name: str):
    assert f"field more has {name}" in (EraserHeader("Cats", more={name: [0, 1]}).validation_error() or "")


def test_a_name_is_a_header():
    assert EraserHeader("Cats").validation_error() is None
    assert EraserHeader.parse({"concept": "Cats"}) == EraserHeader("Cats")


def test_fields_that_are_not_known_are_kept(tmp_path: Path):
    e = make_eraser()
    note = {"by": ["me", None, 1.5]}
    free = replace(e, header=replace(e.header, kind="style", open_share=1, more={"note": note, "more": 2}))
    free.save(tmp_path / "x")
    assert tensor_file.load(tmp_path / "x", "eraser")[1]["note"] == note
    assert Eraser.load(tmp_path / "x").header == free.header


@given(headers)
def test_a_header_and_its_json_are_inverse(header: EraserHeader):
    written = header.as_json()
    assert EraserHeader.parse(json.loads(json.dumps(written))) == header
    assert EraserHeader.parse(written).as_json() == written and header.validation_error() is None


def test_every_field_is_checked():
    fields = {f.name for f in dataclasses.fields(EraserHeader)} - {"more"}
    assert fields == {field for field, _ in WRONG}


@pytest.mark.parametrize("site", ["nothing.mid_block", "scheduler", "device", "__class__", "unet2.down_blocks.0"])
def test_a_site_in_no_component_with_a_model_that_it_was_made_for(site: str):
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    there = Site(site)
    corrections = tuple(replace(c, site=Site(f"{site}.x"), also=()) for c in e.corrections)
    lost = Eraser(replace(e.gate, site=there), corrections, replace(e.header, made_for=made))
    with pytest.raises(SiteError) as caught, attach(pipe, lost):
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(SiteError):
        made_for(pipe, [there])


@pytest.mark.parametrize("weights", [{}, {"0": (0.0,) * 4}, {"a": (1e38,) * 4}])
def test_weights_that_say_nothing_are_taken_for_the_same_and_warn_of_nothing(weights: dict[str, tuple[float, ...]]):
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    known = {key: values for key, values in zip(made.weights, weights.values(), strict=False)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in (weights, known):  # under keys that the model has, too
            what, how = find_difference(pipe, [e.gate.site], replace(made, weights=said))
            assert "nan" not in how and (what == "" or said is known)
    assert find_difference(pipe, [e.gate.site], replace(made, weights={})) == ("", "")


def test_other_weights_are_still_seen():
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    other = {key: tuple(v + 1 for v in values) for key, values in made.weights.items()}
    assert find_difference(pipe, [e.gate.site], replace(made, weights=other))[0] == "weights"
    assert find_difference(pipe, [e.gate.site], made) == ("", "")
