"""Noise levels: by the scheduler's own mixture, from the timestep that a denoiser was given."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from helpers import pipelines
from neuraleraser.sites import denoiser_calls, input_and_target, noise_level


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"prediction_type": "sample"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_the_slope_says_which_noise_a_prediction_implies(kind: str, settings: dict[str, Any]):
    """Two pairs (x_0, noise) with one state: their predictions differ by what their noises do, divided by the slope."""
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[5]
    level = noise_level(scheduler, t)
    g = torch.Generator().manual_seed(0)
    x_0, noise, other = (torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=g) for _ in range(3))
    one, target = input_and_target(scheduler, x_0, noise, float(t))
    # state = a x_0 + s noise, and signal_to_noise is (a / s)^2
    other_x_0 = x_0 + (noise - other) / level.signal_to_noise**0.5
    two, other_target = input_and_target(scheduler, other_x_0, other, float(t))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(level.slope * (target - other_target), noise - other)
    if kind == "DDIMScheduler":
        share = float(scheduler.alphas_cumprod[int(t)])
        assert level.signal_to_noise == pytest.approx(share / (1 - share))


@pytest.mark.parametrize("family", pipelines.BUILDERS)
def test_what_denoisers_are_given_is_found_again(family: str):
    pipe, found = pipelines.BUILDERS[family](), []
    with denoiser_calls(pipe, lambda call: found.append(noise_level(pipe.scheduler, call.timestep))):
        pipelines.run(pipe, 0, n=2, steps=4)
    assert found == [noise_level(pipe.scheduler, t) for t in pipe.scheduler.timesteps]
    levels = [level.signal_to_noise for level in found]
    assert len(levels) == 4 and levels == sorted(levels) and len(set(levels)) == 4
