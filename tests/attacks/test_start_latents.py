"""Start latents: the noise from which a prompt draws a given picture, searched through a method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import attach
from neuraleraser.attacks import search_start_latents
from neuraleraser.attacks.denoising import denoising_target
from neuraleraser.attacks.latents import latents_of
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
S = Sampling(num_inference_steps=2, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def search(pipe: Any, images: Any = IMAGES, prompts: Any = ("a", "b"), **settings: Any) -> torch.Tensor:
    return search_start_latents(pipe, images, prompts, **{"guidance": 2.0, "turns": 2, "steps": 2, **settings})


def first_noise(pipe: Any, share: float) -> tuple[torch.Tensor, torch.Tensor, list[torch.Generator]]:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    shown = latents_of(pipe, IMAGES)
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    return shown, share * shown + (1 - share**2) ** 0.5 * noise, generators


def test_the_start_is_the_picture_noised_with_a_part_of_itself(pipe: Any) -> None:
    shown, noise, _ = first_noise(pipe, 0.25)
    alpha = pipe.scheduler.alphas_cumprod[999]
    expected = alpha.sqrt() * shown + (1 - alpha).sqrt() * noise
    assert torch.allclose(search(pipe, steps=0), expected, atol=1e-6)
    assert search(pipe).shape == shown.shape and not search(pipe).requires_grad


@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.stable_diffusion_2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_goes_down_the_guided_prediction_s_error(make: Any, guidance: float) -> None:
    """Written out in float64: a first step of Adam goes by its rate against the gradient's sign. With predicted noise
    and velocity alike the target moves with the noise."""
    pipe = make()
    shown, noise, generators = first_noise(pipe, 0.0)
    times = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators])
    found = search(pipe, guidance=guidance, share=0.0, turns=1, steps=1, rate=0.01)
    alpha = pipe.scheduler.alphas_cumprod[999]
    moved = (found - alpha.sqrt() * shown) / (1 - alpha).sqrt() - noise
    for module in (pipe.unet, pipe.text_encoder):
        module.double()
    with torch.no_grad():
        text, empty = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (["a", "b"], ["", ""]))
    e = noise.double().requires_grad_()
    noisy, target = denoising_target(pipe, shown.double(), e, times)
    prediction, without = (pipe.unet(noisy, times, encoder_hidden_states=x).sample for x in (text, empty))
    F.mse_loss(without + guidance * (prediction - without), target).backward()
    assert e.grad is not None
    clear = e.grad.abs() > 0.01 * e.grad.abs().mean()  # elsewhere Adam's own epsilon, and rounding, may show
    assert clear.float().mean() > 0.9
    assert torch.allclose(moved[clear], (-0.01 * e.grad.sign()).float()[clear], atol=1e-3)


def test_the_loss_falls(pipe: Any) -> None:
    losses: list[float] = []
    search(pipe, turns=3, steps=8, rate=0.05, on_turn=lambda turn, loss: losses.append(loss))
    assert losses[-1] < 0.95 * losses[0]


def test_an_image_does_not_depend_on_the_others(pipe: Any) -> None:
    whole, alone = search(pipe), search(pipe, IMAGES[:1], ["a"])
    assert (whole[:1] - alone).abs().max() < 1e-3
    assert not torch.equal(whole[0], whole[1])


def test_it_is_deterministic_goes_through_the_eraser_and_leaves_nothing(pipe: Any) -> None:
    before, hooks = generate(pipe, ["a", "b"], [0, 1], S), pipelines.left(pipe)
    base, opened, shut = search(pipe), make_eraser(), make_eraser(**SHUT)
    assert torch.equal(base, search(pipe)) and not torch.equal(base, search(pipe, seed=7))
    assert torch.equal(base, search(pipe, applied=lambda using: attach(using, shut)))
    assert not torch.equal(base, search(pipe, applied=lambda using: attach(using, opened)))
    assert np.array_equal(generate(pipe, ["a", "b"], [0, 1], S), before) and pipelines.left(pipe) == hooks
    drawn = generate(pipe, ["a", "b"], [0, 1], S, latents=base)
    assert not np.array_equal(drawn, before)


def test_success_ends_it(pipe: Any) -> None:
    turns: list[int] = []
    tried: list[torch.Tensor] = []

    def succeeds(latents: torch.Tensor) -> bool:
        tried.append(latents)
        return len(tried) == 2

    found = search(pipe, turns=5, succeeds=succeeds, on_turn=lambda turn, loss: turns.append(turn))
    assert turns == [0, 1] and torch.equal(found, tried[1]) and not torch.equal(*tried)


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="2 images, 1 prompts"):
        search(pipe, prompts=["a"])
    with pytest.raises(SettingsError, match="share is 2"):
        search(pipe, share=2)
    with pytest.raises(SettingsError, match="turns is 0"):
        search(pipe, turns=0)
    with pytest.raises(SettingsError, match="there are no images"):
        search(pipe, IMAGES[:0], [])
    with pytest.raises(DataError, match="uint8"):
        search(pipe, IMAGES.astype(np.float32))
    with pytest.raises(SettingsError, match="several text encoders or none"):
        search(pipelines.stable_diffusion_xl())
