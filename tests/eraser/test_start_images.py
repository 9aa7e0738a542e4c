"""Pictures that come in: an image gate looks at them in the first forward, and the correction acts in every task."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import (
    ConceptRefusedError,
    ConceptRemainsWarning,
    EraserNotAppliedError,
    attach,
    load_eraser,
    unload_erasers,
)
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
    with pytest.warns(ConceptRemainsWarning, match=r"show Cats, and at strength 0\.5") as seen, attach(pipe, high):
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


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
FLOATS = np.asarray(PICTURE, np.float32)[None] / 255
HALF = np.zeros((1, 16, 16), np.float32)
HALF[:, :, :8] = 1
ODD: dict[str, dict[str, Any]] = {
    "grey": {"image": PICTURE.convert("L")},
    "with alpha": {"image": PICTURE.convert("RGBA")},
    "with a palette": {"image": PICTURE.convert("P")},
    "another size": {"image": PICTURE.resize((24, 8))},
    "one pixel": {"image": PICTURE.resize((1, 1))},
    "floats": {"image": FLOATS},
    "too many": {"image": [PICTURE] * 3},
    "none": {"image": []},
    "a number": {"image": 3},
    "nothing": {"image": None},
    "strength 0": {"strength": 0.0},
    "strength 2": {"strength": 2.0},
    "strength NaN": {"strength": float("nan")},
    "an empty mask": {"mask_image": Image.new("L", (16, 16), 0)},
    "a full mask": {"mask_image": Image.new("L", (16, 16), 255)},
    "a mask of another size": {"mask_image": Image.new("L", (8, 8), 255)},
    "a mask of truth values": {"image": FLOATS, "mask_image": HALF > 0},
    "a mask that is none": {"mask_image": "mask.png"},
}


def called(pipe: Any, **given: Any) -> Any:
    """The picture [height, width, 3] of a direct call, or type and text of its error."""
    masked = {"mask_image": Image.fromarray(np.uint8(255 * HALF[0]))} if "Inpaint" in type(pipe).__name__ else {}
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "strength": 1.0, "image": PICTURE, **masked, **given}
    try:
        return pipe("a", generator=torch.Generator().manual_seed(0), output_type="np", **call).images[0]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", ["sd1_img2img", "sd1_inpaint"])
def test_odd_pictures_are_as_diffusers_takes_them(name: str) -> None:
    """An eraser adds no error and hides none, and afterwards it erases as before."""
    pipe = BUILDERS[name]()
    shut, opened = seeing(name, pipe, **SHUT), seeing(name, pipe)
    with attach(pipe, opened):
        erased = called(pipe)
    drawn = 0
    for odd, given in ODD.items():
        if "mask_image" in given and name != "sd1_inpaint":
            continue
        plain = called(pipe, **given)
        with attach(pipe, shut):
            beside = called(pipe, **given)
        assert beside == plain if isinstance(plain, tuple) else np.array_equal(beside, plain), odd
        drawn += not isinstance(plain, tuple)
        with attach(pipe, opened, action="erase_or_refuse") as trace:
            called(pipe, **given)
            assert np.array_equal(called(pipe), erased), odd
        assert trace.fired
    assert 2 <= drawn < len(ODD)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("name", "spoilt"),
    [("sd1_img2img", "image"), *((n, p) for n in ("sd1_inpaint", "flux_inpaint") for p in ("image", "mask_image"))],
)
def test_nan_in_a_picture_or_a_mask_is_no_image(name: str, spoilt: str, steps: int) -> None:
    """In one step at full strength a denoiser sees only noise: NaN comes after it, with what the mask leaves."""
    pipe = BUILDERS[name]()
    given: dict[str, Any] = {"image": torch.from_numpy(FLOATS).permute(0, 3, 1, 2)}
    if "inpaint" in name:
        given |= {"mask_image": torch.from_numpy(HALF)[None], "height": 16, "width": 16}

    def draw(**given: Any) -> Any:
        noise, guidance = torch.Generator().manual_seed(0), 1.0
        call = {"num_inference_steps": steps, "strength": 1.0, "guidance_scale": guidance, "output_type": "np"}
        return pipe(**pipelines.embeds(pipe, 1, guidance), **call, **given, generator=noise).images

    with attach(pipe, seeing(name, pipe, **SHUT)):
        good = draw(**given)
        bad = given[spoilt].clone()
        bad[0, 0, 0, 0] = float("nan")
        with pytest.raises(EraserNotAppliedError, match="NaN"):
            draw(**(given | {spoilt: bad}))
        assert np.array_equal(draw(**given), good)
