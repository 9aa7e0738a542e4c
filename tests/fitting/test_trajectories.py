"""Pooled features: of the right prompt, step and branch, however a scheduler steps."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.fitting.trajectories import SHARES, conditional_rows, pool, pooled_features
from neuraleraser.sae import SAE
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

AT = Site("unet.mid_block.attentions.0")
SAMPLING = Sampling(num_inference_steps=3, batch_size=2)
PLAIN, SEEDS = ["a", "b", "c"], [1, 2, 3]


@pytest.fixture(scope="module")
def sae() -> SAE:
    w = torch.nn.functional.normalize(random(40, 32, seed=1), dim=1)
    return SAE(w, random(40, seed=2), w, 0.1 * random(32, seed=3), torch.full((40,), 0.2))


def test_pooled_features_are_those_of_the_stream(sae: SAE) -> None:
    pipe = pipelines.stable_diffusion()
    from neuraleraser.activations import collect

    want: dict[Any, torch.Tensor] = {}

    def on(seen: Any) -> None:
        for i, x in zip(seen.images, sae.encode(seen.x), strict=True):
            want[i, seen.timestep, seen.branch] = torch.stack([pool(x[None], q)[0] for q in SHARES])

    images = collect(pipe, PLAIN, SEEDS, [AT], on, SAMPLING)
    pooled, same = pooled_features(pipe, sae, AT, PLAIN, SEEDS, SAMPLING)
    assert (images == same).all()
    for i in range(3):
        for k, t in enumerate(pooled.times.tolist()):
            for branch in (0, 1):
                torch.testing.assert_close(
                    pooled.values[i, k, branch].float(), want[i, t, branch], atol=1e-2, rtol=1e-2
                )


@pytest.mark.parametrize(
    ("scheduler", "settings", "calls"),
    [
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 3),
        ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}, 5),  # two calls a step but for the last
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 4),  # the second step twice
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_call_belongs_to_its_step_and_image(
    scheduler: str, settings: dict[str, Any], calls: int, sae: SAE
) -> None:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    prompts, seeds, s = ["a", "b c", "d e f"], [3, 4, 5], Sampling(num_inference_steps=3, batch_size=2)
    whole, images = pooled_features(pipe, sae, AT, prompts, seeds, s)
    assert len(whole.times) == calls and whole.values.shape[:3] == (3, calls, 2) and len(images) == 3
    assert conditional_rows(whole).shape == (3, calls, len(SHARES), 40)
    alone, _ = pooled_features(pipe, sae, AT, prompts[2:], seeds[2:], s)
    assert torch.equal(alone.values[0], whole.values[2])
