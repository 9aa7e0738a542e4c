"""Completion from a middle step: it is the same drawing in two parts, of which a method acts in the second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach
from neuraleraser.attacks import draw_to_step, from_step
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import denoiser_calls

PROMPTS, SEEDS = ["a", "b", "c"], [0, 1, 2]
S = Sampling(num_inference_steps=4, batch_size=2)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.stable_diffusion().to(request.param)


def completed(pipe: Any, step: int, latents: torch.Tensor, prompts: Any = PROMPTS) -> np.ndarray:
    with from_step(pipe, step):
        return generate(pipe, prompts, [9, 9, 9], S, latents=latents)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_two_parts_are_one_drawing(pipe: Any, step: int) -> None:
    """Bit for bit, padding and all, and the seeds have no say in the second part."""
    whole = generate(pipe, PROMPTS, SEEDS, S)
    half = draw_to_step(pipe, PROMPTS, SEEDS, step, S)
    assert half.shape == (3, 4, 8, 8) and half.dtype == torch.float32
    assert np.array_equal(completed(pipe, step, half), whole)
    if step == 1:  # what is left later hardly changes this model's pictures
        assert not np.array_equal(completed(pipe, step, half, ["d"] * 3), whole)


def test_each_part_takes_its_own_steps_alone(pipe: Any) -> None:
    times: list[float] = []
    with denoiser_calls(pipe, lambda call: times.append(float(call.timestep.flatten()[0]))):
        generate(pipe, PROMPTS[:2], SEEDS[:2], S)
        whole, times[:] = list(times), []
        half = draw_to_step(pipe, PROMPTS[:2], SEEDS[:2], 3, S)
        first, times[:] = list(times), []
        with from_step(pipe, 3):
            generate(pipe, PROMPTS[:2], SEEDS[:2], S, latents=half)
    assert first == whole[:3] and times == whole[3:]


def test_an_eraser_acts_from_there_on(pipe: Any) -> None:
    half = draw_to_step(pipe, PROMPTS, SEEDS, 1, S)
    with attach(pipe, make_eraser()) as trace:
        erased = completed(pipe, 1, half)
    assert {tuple(times) for fired in trace.fired.values() for times in fired.values()} == {(501.0, 251.0, 1.0)}
    assert not np.array_equal(erased, generate(pipe, PROMPTS, SEEDS, S))
    with attach(pipe, make_eraser()), pytest.raises(SettingsError, match="needs the base model's own"):
        draw_to_step(pipe, PROMPTS, SEEDS, 3, S)


def test_nothing_stays_behind(pipe: Any) -> None:
    before, hooks = generate(pipe, PROMPTS, SEEDS, S), pipelines.left(pipe)
    kept = {name: value for name, value in vars(pipe.scheduler).items() if name != "timesteps"}
    half = draw_to_step(pipe, PROMPTS, SEEDS, 2, S)
    assert not pipe.interrupt
    completed(pipe, 2, half)
    with pytest.raises(ZeroDivisionError), from_step(pipe, 2):
        _ = 1 / 0
    assert {name: value for name, value in vars(pipe.scheduler).items() if name != "timesteps"} == kept
    assert len(pipe.scheduler.timesteps) == 4 and pipelines.left(pipe) == hooks
    assert np.array_equal(generate(pipe, PROMPTS, SEEDS, S), before)


def test_what_does_not_fit_is_refused() -> None:
    pipe = pipelines.stable_diffusion()
    for step in (0, 4):
        with pytest.raises(SettingsError, match=f"step is {step}"):
            draw_to_step(pipe, PROMPTS, SEEDS, step, S)
    with from_step(pipe, 4), pytest.raises(SettingsError, match="4 steps are left out, and the call has 4"):
        generate(pipe, PROMPTS, SEEDS, S)
    for begin in (generate, lambda *args: draw_to_step(*args[:3], 1, S)):  # from noise, at the wrong level
        with from_step(pipe, 1), pytest.raises(SettingsError, match="the call has none: pass those of draw_to_step"):
            begin(pipe, PROMPTS, SEEDS, S)
    with from_step(pipe, 1):
        with from_step(pipe, 1):  # one inside another leaves the other as it was
            pass
        with pytest.raises(SettingsError, match="the call has none"):
            generate(pipe, PROMPTS, SEEDS, S)
    assert "prepare_latents" not in vars(pipe)
    assert draw_to_step(pipe, [], [], 1, S).shape == (0, 0, 0, 0)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(SettingsError, match="samples with EulerDiscreteScheduler"):
        draw_to_step(pipe, PROMPTS, SEEDS, 1, S)
    with pytest.raises(SettingsError, match="samples with EulerDiscreteScheduler"), from_step(pipe, 1):
        pass
