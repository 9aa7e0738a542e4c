"""Fields of an eraser's header that are read: each of its kind, or the file is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import DataError, FileError, SiteError
from neuraleraser.io import artifact
from neuraleraser.sites import Site, made_for
from neuraleraser.sites.fingerprint import differs

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
    ("open_share", "most"),
    ("open_share", 1.5),
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
    e = make_eraser()
    bad = replace(e, header={**e.header, field: value})
    with pytest.raises(DataError, match="was not written"):
        bad.save(tmp_path / "x")
    e.save(tmp_path / "x")
    tensors, header = artifact.load(tmp_path / "x", "eraser")
    artifact.save(tmp_path / "x", "eraser", tensors, {**header, field: value})
    with pytest.raises(FileError, match=f"field {field}") as caught:
        Eraser.load(tmp_path / "x")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(DataError), attach(pipelines.stable_diffusion(), bad):
        pass


def test_fields_that_are_not_read_may_hold_anything(tmp_path: Path):
    e = make_eraser()
    free = replace(e, header={**e.header, "note": {"by": ["me", None, 1.5]}, "kind": "style", "open_share": 1})
    free.save(tmp_path / "x")
    assert Eraser.load(tmp_path / "x").header == free.header


@pytest.mark.parametrize("site", ["nothing.mid_block", "scheduler", "device", "__class__", "unet2.down_blocks.0"])
def test_a_site_in_no_component_with_a_model_that_it_was_made_for(site: str):
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    there = Site(site)
    corrections = tuple(replace(c, site=Site(f"{site}.x"), also=()) for c in e.corrections)
    lost = Eraser(replace(e.gate, site=there), corrections, {**e.header, "made_for": made})
    with pytest.raises(SiteError) as caught, attach(pipe, lost):
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(SiteError):
        made_for(pipe, [there])


@pytest.mark.parametrize(
    "weights", [{}, {"0": [0.0] * 4}, {"a": "x"}, {"a": [1e308] * 4}, {"a": None}, None, [], "x", {"a": [10**400] * 4}]
)
def test_weights_that_say_nothing_are_taken_for_the_same_and_warn_of_nothing(weights: Any):
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    if isinstance(weights, dict):  # under keys that the model has, too
        keys = list(made["weights"])
        weights = {keys[i]: value for i, value in enumerate(weights.values())}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        what, how = differs(pipe, [e.gate.site], {**made, "weights": weights})
    assert "nan" not in how and (what == "" or weights == {next(iter(made["weights"])): [0.0] * 4})
    assert differs(pipe, [e.gate.site], {**made, "weights": {}}) == ("", "")


def test_other_weights_are_still_seen():
    pipe, e = pipelines.stable_diffusion(), make_eraser()
    made = made_for(pipe, [e.gate.site])
    other = {key: [v + 1 for v in values] for key, values in made["weights"].items()}
    assert differs(pipe, [e.gate.site], {**made, "weights": other})[0] == "weights"
    assert differs(pipe, [e.gate.site], made) == ("", "")
