"""Recorded states line up with prompts, however often a scheduler asks for a step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import tiny
from handmade import random
from neuraleraser.fit.states import pooled_features, recorded
from neuraleraser.sae import SAE
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, replay

AT = Site("unet.mid_block.attentions.0")


def sae() -> SAE:
    w = torch.nn.functional.normalize(random(20, 32, seed=1), dim=1)
    return SAE(w, random(20, seed=2), w, 0.1 * random(32, seed=3), torch.full((20,), 0.1))


@pytest.mark.parametrize(
    ("scheduler", "settings", "calls"),
    [
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 3),
        ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}, 5),  # two calls a step but for the last
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 4),  # the second step twice
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_call_belongs_to_its_step_and_image(scheduler: str, settings: dict[str, Any], calls: int) -> None:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    prompts, seeds, s = ["a", "b c", "d e f"], [3, 4, 5], Sampling(steps=3, batch=2)
    found, pooled = recorded(pipe, prompts, seeds, s, sae(), AT)
    assert len(found) == len(pooled.times) == calls and pooled.values.shape[:3] == (3, calls, 2)
    assert [float(c.timestep[0]) for c in found] == pooled.times.tolist()
    for call in found:
        assert call.state.shape[0] == call.prediction.shape[0] == 3
        with torch.no_grad():
            again = replay(pipe, call.state, call.timestep, call.conditioning)
        torch.testing.assert_close(again, call.prediction, atol=1e-4, rtol=1e-4)
    whole, images = pooled_features(pipe, sae(), AT, prompts, seeds, s)
    assert torch.equal(whole.values, pooled.values) and len(images) == 3
    alone, _ = pooled_features(pipe, sae(), AT, prompts[2:], seeds[2:], s)
    assert torch.equal(alone.values[0], whole.values[2])
