"""Mistakes of a first-time user, each one sentence."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import pytest

import neuraleraser
from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import Concept, attach, load_eraser, set_erasers
from neuraleraser.eraser import check_nothing_acts
from neuraleraser.errors import SettingsError, SiteError


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def test_what_needs_the_base_model_is_refused_where_an_eraser_acts(sd: Any) -> None:
    """What would be fitted or measured on images that are erased already is weak, and nothing would say so."""
    for action, strength, acts in (
        ("erase", 1.0, True),
        ("refuse", 1.0, True),
        ("detect", 1.0, False),
        ("erase", 0.0, False),
    ):
        with attach(sd, make_eraser(), strength, action=action):
            if acts:
                with pytest.raises(SettingsError, match=r"erasers of Cats act on this pipeline, and a fit needs"):
                    check_nothing_acts(sd, "a fit")
            else:
                check_nothing_acts(sd, "a fit")
    check_nothing_acts(sd, "a fit")
    load_eraser(sd, make_eraser())
    for call in (
        lambda: neuraleraser.erase(sd, "a cat"),
        lambda: neuraleraser.calibrate(sd, make_eraser()),
        lambda: neuraleraser.diagnose(sd, [make_eraser()]),
        lambda: neuraleraser.evaluate(sd, []),
        lambda: neuraleraser.calibrate_clip_judge(sd, Concept.from_phrase("a cat")),
    ):
        with pytest.raises(SettingsError, match="erasers of Cats act on this pipeline"):
            call()


@pytest.mark.parametrize("erasers", ["van-gogh.safetensors", None, 5, [None], ["x"], {"a": 1}])
def test_what_is_no_eraser_is_one_sentence(sd: Any, erasers: Any) -> None:
    with pytest.raises(SettingsError, match=r"Eraser\.load\(path\)") as caught:
        attach(sd, erasers)
    assert "\n" not in str(caught.value)


def test_arguments_in_the_wrong_order(sd: Any) -> None:
    for wrong in (lambda: attach(make_eraser(), sd), lambda: attach(sd, sd)):  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="the pipeline comes first"):
            wrong()
    for call in (load_eraser, set_erasers):
        with pytest.raises(SiteError, match="UNet2DConditionModel is no diffusers DiffusionPipeline"):
            call(sd.unet, make_eraser() if call is load_eraser else "Cats")
    with pytest.raises(SiteError, match="no diffusers DiffusionPipeline"), attach(sd.unet, make_eraser()):
        pass


def test_a_pipeline_s_name_in_its_place() -> None:
    with pytest.raises(SiteError, match=r"'canvas' was passed as the pipeline.*open_pipeline opens one"):
        neuraleraser.erase("canvas", "a cat")


def test_attach_without_with_is_warned_of(sd: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(sd, make_eraser())
        gc.collect()
    assert ["with attach(pipe, eraser):" in str(w.message) for w in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(sd, make_eraser(**SHUT)):
            pass
        gc.collect()


def test_modular_pipelines_are_refused_in_one_sentence() -> None:
    from diffusers import StableDiffusionXLAutoBlocks

    parts: Any = pipelines.stable_diffusion_xl()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(unet=parts.unet, vae=parts.vae, scheduler=parts.scheduler)
    eraser = make_eraser("stable_diffusion_xl")
    for call in (lambda: attach(pipe, eraser).__enter__(), lambda: load_eraser(pipe, eraser)):
        with pytest.raises(SiteError, match="modular pipelines are not supported"):
            call()


def test_a_call_with_wrong_arguments_is_one_error(monkeypatch: pytest.MonkeyPatch):
    second: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", second.append)
    wrong: dict[str, Any] = {"strenght": 1}
    with pytest.raises(TypeError, match="strenght"):
        attach(None, [], **wrong)
    gc.collect()
    assert second == []
