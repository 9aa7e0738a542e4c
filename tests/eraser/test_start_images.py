"""Pictures that come in: an image gate looks at them in the first forward, and the correction acts in every task."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import ConceptRefusedError, ConceptRemainsWarning, attach, load_eraser, unload_erasers
from neuraleraser.eraser import Eraser
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES, DenoiserCall, denoiser_calls, record, replay

TASKS = {
    "sd1_img2img": "stable_diffusion",
    "sd1_inpaint": "stable_diffusion",
    "sd1_inpaint_model": "stable_diffusion",
    "sd1_controlnet": "stable_diffusion",
    "sd1_controlnet_img2img": "stable_diffusion",
    "sdxl_img2img": "stable_diffusion_xl",
    "sdxl_inpaint": "stable_diffusion_xl",
    "sd3_img2img": "stable_diffusion_3",
    "flux_img2img": "flux",
    "flux_inpaint": "flux",
    "flux_kontext": "flux",
}
STARTED = [name for name in TASKS if "img2img" in name or "inpaint" in name]  # those with a strength
BUILDERS = {**pipelines.EVERY, "flux_kontext": pipelines.flux_kontext}
pytestmark = pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning")


def seeing(name: str, pipe: Any, least: float | None = None, **gate: Any) -> Eraser:
    """An eraser whose prompt gate stays shut, and whose image gate sees start images."""
    eraser = with_picture(make_eraser(TASKS[name], **SHUT), pipe, **gate)
    routes = (*PROMPT_ROUTES, *IMAGE_ROUTES)
    return replace(eraser, header=replace(eraser.header, routes=routes, least_strength=least))


@pytest.mark.parametrize("name", TASKS)
def test_the_correction_acts_in_every_task(name: str) -> None:
    """With a mask, a start image or a ControlNet's residuals, which stay as they are for both prompts."""
    pipe = BUILDERS[name]()
    eraser = seeing(name, pipe)
    assert eraser.guided is not None and eraser.image_gate is not None
    gate, calls = eraser.image_gate, list[DenoiserCall]()
    with attach(pipe, eraser), denoiser_calls(pipe, calls.append):
        pipelines.run(pipe, 0, n=2)
    assert calls
    with torch.no_grad():
        for call in calls:
            seen: list[tuple[Tensor, Tensor]] = []
            with record(pipe, [gate.site], lambda site, x, c, seen=seen: seen.append((x, c.timestep))):
                base = replay(pipe, call.state, call.timestep, call.conditioning)
            opening = gate(*seen[0]).view(-1, 2).amax(0).repeat(len(base) // 2)
            moved = (call.prediction - base).flatten(1).norm(dim=1)
            assert torch.equal(moved > 1e-4, opening > 0) and bool((opening > 0).any())


@pytest.mark.parametrize("name", STARTED)
def test_a_start_image_that_cannot_be_erased_is_refused_or_named(name: str) -> None:
    pipe = BUILDERS[name]()  # at strength 0.5
    low, high, unknown = (seeing(name, pipe, least) for least in (0.4, 0.6, None))
    for eraser in (low, unknown):
        with warnings.catch_warnings(), attach(pipe, eraser, action="erase_or_refuse"):
            warnings.simplefilter("error", ConceptRemainsWarning)
            pipelines.run(pipe, 0)
    with pytest.warns(ConceptRemainsWarning, match=r"shows Cats, and at strength 0\.5") as seen, attach(pipe, high):
        erased = pipelines.run(pipe, 0)
    assert len([w for w in seen if w.category is ConceptRemainsWarning]) == 1  # once a call, not at each step
    with attach(pipe, low):
        assert torch.equal(pipelines.run(pipe, 0), erased)
    made: list[Tensor] = []
    with pytest.raises(ConceptRefusedError, match="image 0: Cats"), attach(pipe, high, action="erase_or_refuse"):
        made.append(pipelines.run(pipe, 0))
    assert not made


def test_a_picture_without_the_concept_is_let_through() -> None:
    pipe = pipelines.EVERY["sd1_img2img"]()
    base = pipelines.run(pipe, 0)
    with warnings.catch_warnings(), attach(pipe, seeing("sd1_img2img", pipe, 0.9, **SHUT), action="erase_or_refuse"):
        warnings.simplefilter("error")
        assert torch.equal(pipelines.run(pipe, 0), base)


def test_without_a_start_image_no_strength_is_too_low() -> None:
    pipe = pipelines.stable_diffusion()
    with attach(pipe, seeing("sd1_img2img", pipe, 1.0), action="erase_or_refuse") as trace:
        pipelines.run(pipe, 0)
    assert trace.fired


def test_an_eraser_that_is_loaded_to_stay_refuses_too() -> None:
    pipe = pipelines.EVERY["sd1_img2img"]()
    load_eraser(pipe, seeing("sd1_img2img", pipe, 0.9), name="cats", action="erase_or_refuse")
    with pytest.raises(ConceptRefusedError, match="image 0: cats"):
        pipelines.run(pipe, 0)
    unload_erasers(pipe)
