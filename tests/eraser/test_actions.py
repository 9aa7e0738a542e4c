"""Detecting, refusing, and the record of what fired in each image."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import ConceptRefusedError, attach, eraser_trace, load_eraser, set_erasers, unload_erasers
from neuraleraser.eraser import Eraser
from neuraleraser.errors import EraserNotAppliedError, SettingsError
from neuraleraser.sites import denoiser, record


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def between(pipe: Any, eraser: Eraser, n: int = 2, **call: Any) -> tuple[Eraser, int]:
    """The eraser with a bound that only one of n images reaches, and that image."""
    found: list[torch.Tensor] = []
    with record(pipe, [eraser.gate.site], lambda site, x, call: found.append(eraser.gate.evidence(x))):
        pipelines.run(pipe, 0, **({"n": n} | call if "num_images_per_prompt" not in call else call))
    most = torch.stack(found).view(len(found), -1, n)[:, -1].amax(0)  # of what is drawn, not of the negative prompt
    low = float(most.sort().values[-2:].mean())
    bound = torch.full_like(eraser.gate.low, low)
    return replace(eraser, gate=replace(eraser.gate, low=bound, high=bound + 1e-3)), int(most.argmax())


@pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning")
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux", "sdxl_inpaint"])
def test_refused_before_an_image_is_returned(name: str) -> None:
    """Also where a pipeline returns latents early (SDXL's inpainting)."""
    pipe, images = pipelines.EVERY[name](), []
    family = {"sdxl_inpaint": "stable_diffusion_xl"}.get(name, name)
    one, loud = between(pipe, make_eraser(family))
    base = pipelines.run(pipe, 0, n=2)
    with (
        pytest.raises(ConceptRefusedError, match=rf"image {loud}: Cats") as caught,
        attach(pipe, one, action="refuse") as trace,
    ):
        images.append(pipelines.run(pipe, 0, n=2))
    assert not images and caught.value.images == {loud: ["Cats"]} and trace.fired.keys() == {loud}
    with attach(pipe, make_eraser(family, **SHUT), action="refuse"):
        assert torch.equal(pipelines.run(pipe, 0, n=2), base)
    with attach(pipe, one, 0.0, action="refuse") as trace:  # at strength 0 it is seen, and let through
        assert torch.equal(pipelines.run(pipe, 0, n=2), base)
    assert trace.fired.keys() == {loud}
    by_image = [[1.0, 0.0] if loud else [0.0, 1.0]]
    with attach(pipe, one, by_image, action="refuse"):
        assert torch.equal(pipelines.run(pipe, 0, n=2), base)


def test_one_refuses_while_another_erases(sd: Any) -> None:
    cats, dogs = make_eraser(name="Cats"), make_eraser(seed=40, name="Dogs")
    with attach(sd, cats):
        erased = pipelines.run(sd, 0)
    quiet = make_eraser(seed=40, name="Dogs", **SHUT)
    with attach(sd, [cats, quiet], action=["erase", "refuse"]):
        assert torch.equal(pipelines.run(sd, 0), erased)
    with pytest.raises(ConceptRefusedError, match="Dogs"), attach(sd, [cats, dogs], action=["erase", "refuse"]):
        pipelines.run(sd, 0)
    for wrong in ("delete", ["erase"], ["erase", "hide"]):
        with (
            pytest.raises(SettingsError, match="erase_or_refuse, detect, refuse"),
            attach(sd, [cats, dogs], action=wrong),
        ):
            pass


def test_loaded_to_refuse_and_to_detect(sd: Any) -> None:
    base = pipelines.run(sd, 0)
    load_eraser(sd, make_eraser(), "cats", action="detect")
    assert torch.equal(pipelines.run(sd, 0), base)
    with pytest.raises(SettingsError, match="erase_or_refuse, detect, refuse"):
        load_eraser(sd, make_eraser(seed=9), "other", action="hide")
    load_eraser(sd, make_eraser(seed=40), "dogs", action="refuse")
    with pytest.raises(ConceptRefusedError, match="dogs"):
        pipelines.run(sd, 0)
    set_erasers(sd, "cats")
    assert torch.equal(pipelines.run(sd, 0), base)
    assert [r["image"] for r in eraser_trace(sd).records()] == [0, 1, 2]
    assert [f["action"] for f in eraser_trace(sd).records()[1]["fired"]] == ["detect", "refuse"]
    unload_erasers(sd)
    with pytest.raises(SettingsError, match="no eraser is loaded"):
        eraser_trace(sd)


def test_nan_is_no_reason_to_let_through(sd: Any) -> None:
    next(iter(denoiser(sd).parameters())).data.fill_(float("nan"))
    with pytest.raises(EraserNotAppliedError, match="NaN"), attach(sd, make_eraser(), action="refuse"):
        pipelines.run(sd, 0)


# The record.


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_record_an_image(sd: Any, guidance: float) -> None:
    eraser, loud = between(sd, make_eraser(), guidance=guidance)
    with attach(sd, [eraser, make_eraser(seed=40, name="Dogs", **SHUT)], heat=True) as trace:
        pipelines.run(sd, 0, n=2, guidance=guidance)
        pipelines.run(sd, 0, n=2, guidance=guidance)
    lines = [json.loads(line) for line in trace.jsonl().splitlines()]
    assert [line["image"] for line in lines] == [0, 1, 2, 3]  # counted on from call to call
    assert [bool(line["fired"]) for line in lines] == [i % 2 == loud for i in range(4)]
    (found,) = lines[loud]["fired"]
    assert found == lines[loud + 2]["fired"][0]
    assert (found["eraser"], found["action"]) == ("Cats", "erase") and found["site"] == str(eraser.gate.site)
    assert set(found["timesteps"]) <= {501.0, 1.0} and all(0 < o <= 1 for o in found["openings"])
    assert len(found["heat"]) == 16 and max(found["heat"]) > 0


def test_heat_lies_where_the_evidence_is(sd: Any) -> None:
    eraser = make_eraser()
    seen: list[torch.Tensor] = []
    with record(
        sd, [eraser.gate.site], lambda site, x, call: seen.append(eraser.gate.activations(x)[0] @ eraser.gate.weight)
    ):
        pipelines.run(sd, 0, guidance=1.0)
    with attach(sd, eraser, action="detect", heat=True) as trace:
        pipelines.run(sd, 0, guidance=1.0)
    heat = torch.tensor(trace.records()[0]["fired"][0]["heat"])
    torch.testing.assert_close(heat, torch.stack(seen).amax(0).clamp(min=0), atol=1e-2, rtol=1e-2)


def test_a_call_that_failed_keeps_what_it_saw(sd: Any) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    with attach(sd, make_eraser(), action="detect") as trace:
        with pytest.raises(ZeroDivisionError):
            pipelines.run(sd, 0, callback_on_step_end=fail)
        assert len(trace.fired[0]["Cats"]) == 1
        pipelines.run(sd, 0)
        assert trace.fired.keys() == {0, 1} and len(trace.fired[1]["Cats"]) == 2
        trace.clear()
        pipelines.run(sd, 0)
        assert trace.fired.keys() == {2} and len(trace.records()) == 1


def test_images_of_one_prompt_are_told_apart(sd: Any) -> None:
    def call() -> dict[str, Any]:
        return {"num_images_per_prompt": 3, "generator": [torch.Generator().manual_seed(i) for i in range(3)]}

    eraser, loud = between(sd, make_eraser(), 3, **call())
    with attach(sd, eraser, action="detect") as trace:
        pipelines.run(sd, 0, **call())
    assert trace.fired.keys() == {loud} and len(trace.records()) == 3
