"""Pictures run backwards to noise, and drawn from it again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from helpers import pipelines
from helpers.erasers import open_eraser
from neuraleraser.attacks import inverted_latents, random_denoiser
from neuraleraser.attacks.latents import latents_of
from neuraleraser.canvas.pipeline import load_pipeline
from neuraleraser.eraser import attach
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.canvas import render
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling

SMALL = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FEW = Sampling(num_inference_steps=10, batch_size=2)


def drawn(pipe: Any, latents: Tensor, s: Sampling) -> tuple[Images, Tensor]:
    """Images drawn from latents with an empty prompt, and the final latents."""
    last: dict[int, Tensor] = {}
    ends: list[Tensor] = []

    def keep(_: Any, step: int, time: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        last[step] = state["latents"]
        if step == s.num_inference_steps - 1:
            ends.append(last[step])
        return {}

    n = len(latents)
    images = generate(pipe, [""] * n, range(n), s, latents=latents, callback_on_step_end=keep)
    return images, torch.cat(ends)[:n]


@pytest.mark.parametrize(("make", "scale"), [(pipelines.stable_diffusion, 0.05), (pipelines.stable_diffusion_2, 1.0)])
def test_latents_that_are_drawn_from_are_the_picture_s(make: Any, scale: float):
    """With both kinds of prediction, and guidance that has nothing to push away from. A random denoiser that
    predicts noise is steep, and what it gets wrong grows on the way: only a flatter one brings latents back so well."""
    pipe = make()
    pipe.vae.register_to_config(scaling_factor=5.0)  # latents of unit spread
    pipe.unet.conv_out.weight.data.mul_(scale)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **STABLE_DIFFUSION)
    found = inverted_latents(pipe, SMALL, FEW)
    with torch.no_grad():
        expected = latents_of(pipe, SMALL)
    assert found.shape == expected.shape and found.dtype == torch.float32 and not found.requires_grad
    _, ends = drawn(pipe, found, FEW)
    assert (ends - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert (found - expected).abs().mean() > 0.3 * expected.abs().mean()  # or nothing was run backwards


@pytest.mark.slow
@pytest.mark.parametrize("random", [False, True])
def test_the_canvas_draws_its_renders_again(random: bool):
    """As closely as its autoencoder brings them back, with trained weights and with random ones."""
    pipe = load_pipeline()
    if random:
        pipe = random_denoiser(pipe)
    images = np.stack([render([name], "Van_Gogh", 500, 64) for name in ("Cats", "Trees")])
    s = Sampling(num_inference_steps=25, batch_size=2)
    again, _ = drawn(pipe, inverted_latents(pipe, images, s), s)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents_of(pipe, images) / pipe.vae.config.scaling_factor).sample
    floor = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(again - floor).mean() < 4 and floor.std() > 20


def test_an_image_s_latents_do_not_depend_on_its_company():
    pipe = pipelines.stable_diffusion()
    whole = inverted_latents(pipe, SMALL, FEW)
    assert torch.equal(inverted_latents(pipe, SMALL[::-1].copy(), FEW).flip(0), whole)
    assert torch.equal(inverted_latents(pipe, SMALL[1:2], FEW)[0], whole[1])  # padded by one
    assert not torch.equal(whole[0], whole[1])


def test_a_random_denoiser_is_another_one_of_the_same_shape():
    pipe = pipelines.stable_diffusion()
    before = torch.random.get_rng_state()
    first, again, other = (random_denoiser(pipe, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.unet is not pipe.unet and first.unet.config == pipe.unet.config and not first.unet.training
    assert all(first.components[name] is part for name, part in pipe.components.items() if name != "unet")
    weights = [p.unet.conv_in.weight for p in (first, again, other, pipe)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_no_images_have_no_latents():
    assert len(inverted_latents(pipelines.stable_diffusion(), SMALL[:0], FEW)) == 0


def test_an_eraser_that_acts_is_in_the_way():
    pipe = pipelines.stable_diffusion()
    with attach(pipe, open_eraser()), pytest.raises(SettingsError, match="an inversion needs the base model's"):
        inverted_latents(pipe, SMALL, FEW)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "samples with EulerDiscreteScheduler, and DDIM alone can be run backwards"),
        (DDIMScheduler(clip_sample=True), "clips what it predicts"),
    ],
)
def test_a_scheduler_that_cannot_be_run_backwards(scheduler: Any, message: str):
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = scheduler
    with pytest.raises(SettingsError, match=message):
        inverted_latents(pipe, SMALL, FEW)


def test_other_pipelines_and_images_are_refused():
    with pytest.raises(DataError, match=r"float32 \[3, 16, 16, 3\]: pass one array, uint8"):
        inverted_latents(pipelines.stable_diffusion(), SMALL.astype(np.float32), FEW)  # type: ignore[arg-type]
    pipe = pipelines.stable_diffusion()
    pipe.register_modules(vae=None)
    with pytest.raises(SettingsError, match="no autoencoder with a scaling factor"):
        inverted_latents(pipe, SMALL, FEW)
