"""Routes are named: a call by which a concept may enter unseen is warned of once, before anything is generated."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import Eraser, UnseenRouteWarning, attach, load_eraser, unload_erasers
from neuraleraser.errors import DataError
from neuraleraser.sites import PROMPT_ROUTES
from neuraleraser.sites.routes import CONTROL_IMAGE, INPAINTING, IP_ADAPTER, START_IMAGE, routes_of

SEEN_BY_NAME: dict[str, set[str]] = {
    name: {
        *([START_IMAGE] if "img2img" in name or "inpaint" in name else []),
        *([INPAINTING] if "inpaint" in name else []),
        *([CONTROL_IMAGE] if "controlnet" in name else []),
    }
    for name in pipelines.EVERY
}
PIPELINES = [name for name in pipelines.EVERY if name.startswith("sd1") or name in ("stable_diffusion", "flux_inpaint")]


def named_in(pipe: Any, eraser: Eraser, times: int = 1) -> list[str]:
    """Routes that drawing `times` images warns of."""
    with warnings.catch_warnings(record=True) as seen, attach(pipe, eraser):
        warnings.simplefilter("always")
        for i in range(times):
            pipelines.run(pipe, i, steps=1)
    found = [str(w.message) for w in seen if w.category is UnseenRouteWarning]
    assert all("the gate of Cats does not see" in text for text in found)
    return sorted(text.split("see (")[1].split(")")[0] for text in found)


@pytest.mark.parametrize("name", PIPELINES)
def test_each_route_is_named_once(name: str) -> None:
    family = "flux" if "flux" in name else "stable_diffusion"
    assert named_in(pipelines.EVERY[name](), make_eraser(family, **SHUT), times=2) == sorted(SEEN_BY_NAME[name])


def test_a_gate_that_sees_a_route_is_not_warned_of() -> None:
    pipe = pipelines.EVERY["sd1_inpaint"]()
    eraser = with_picture(make_eraser(**SHUT), pipe, **SHUT)
    sees = replace(eraser, header=replace(eraser.header, routes=(*PROMPT_ROUTES, START_IMAGE)))
    assert named_in(pipe, sees) == [INPAINTING]


def test_another_pipeline_of_the_modules_is_warned_of() -> None:
    pipe = pipelines.stable_diffusion()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    load_eraser(pipe, make_eraser(**SHUT), name="cats")
    pipelines.run(pipe, 0, steps=1)
    with pytest.warns(UnseenRouteWarning, match="start image"):
        pipelines.run(other, 0, steps=1)
    unload_erasers(pipe)


def test_as_an_error_it_comes_before_anything_is_drawn() -> None:
    pipe, ran = pipelines.EVERY["sd1_img2img"](), []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with warnings.catch_warnings(), attach(pipe, make_eraser(**SHUT)):
        warnings.simplefilter("error", UnseenRouteWarning)
        with pytest.raises(UnseenRouteWarning):
            pipelines.run(pipe, 0, steps=1)
    handle.remove()
    assert not ran


def test_adapters_are_told_from_start_images() -> None:
    image = torch.zeros(1)
    plain: Any = SimpleNamespace(components={"unet": None})
    controlled: Any = SimpleNamespace(components={"unet": None, "controlnet": None})
    assert routes_of(plain, {"image": None, "ip_adapter_image": None}) == set()
    assert routes_of(plain, {"ip_adapter_image": image}) == {IP_ADAPTER}
    assert routes_of(plain, {"ip_adapter_image_embeds": [image]}) == {IP_ADAPTER}
    assert routes_of(plain, {"image": image, "ip_adapter_image": image}) == {IP_ADAPTER, START_IMAGE}
    assert routes_of(controlled, {"image": image}) == {CONTROL_IMAGE}
    assert routes_of(controlled, {"image": image, "control_image": image}) == {CONTROL_IMAGE, START_IMAGE}
    assert routes_of(controlled, {"image": None, "control_image": image}) == {CONTROL_IMAGE}


def test_a_file_says_which_routes_its_gate_sees(tmp_path: Any) -> None:
    eraser = make_eraser()
    assert eraser.routes == PROMPT_ROUTES, "what no file says is the prompt alone"
    claims = replace(eraser, header=replace(eraser.header, routes=(*PROMPT_ROUTES, START_IMAGE)))
    with pytest.raises(DataError, match="says that it sees start image, and it has no gate that reads the picture"):
        claims.save(tmp_path / "claims.safetensors")  # it would silence the warning
    said = with_picture(claims, pipelines.stable_diffusion(), **SHUT)
    said.save(tmp_path / "said.safetensors")
    assert Eraser.load(tmp_path / "said.safetensors").routes == (*PROMPT_ROUTES, START_IMAGE)
    for wrong in ("start image", ["by post"], [1], {"start image": 1}):
        with pytest.raises(DataError, match="field routes"):
            replace(eraser, header=replace(eraser.header, routes=wrong)).save(tmp_path / "wrong.safetensors")
