"""Projected gradient descent on a prompt's encoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import attach
from neuraleraser.attacks import perturb_encoding
from neuraleraser.attacks.denoising import denoising_target
from neuraleraser.attacks.latents import latents_of
from neuraleraser.attacks.perturbed_encoding import Norm, direction, projected
from neuraleraser.errors import DataError, SettingsError

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def perturb(pipe: Any, **settings: Any) -> torch.Tensor:
    return perturb_encoding(pipe, IMAGES, "a b", **{"steps": 4, "batch_size": 2, **settings})


def encoded(pipe: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(["a b"], "cpu", 1, False)[0]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_step_is_one_of_the_loss_s_gradient(pipe: Any, norm: Norm) -> None:
    """Written out: the noise, the loss, its gradient, the step, the ball."""
    generator = torch.Generator().manual_seed(5)
    some, times = torch.randint(2, (2,), generator=generator), torch.randint(1000, (2,), generator=generator)
    latents = latents_of(pipe, IMAGES)[some]
    noise = torch.randn(latents.shape, generator=generator)
    center = encoded(pipe).double().requires_grad_()
    pipe.unet.double()
    noisy, target = denoising_target(pipe, latents, noise, times)
    F.mse_loss(
        pipe.unet(noisy, times, encoder_hidden_states=center.expand(2, -1, -1)).sample, target.double()
    ).backward()
    pipe.unet.float()
    g = center.grad
    assert g is not None
    x = center.detach()
    if norm == "l2":
        expected = x - 0.1 * x.norm() * g / g.norm()  # a step of 2.5 radii, brought back to the ball
    else:
        expected = x - 0.1 * x.square().mean().sqrt() * g.sign()
    found = perturb(pipe, norm=norm, radius=0.1, steps=1, seed=5)
    assert (found - expected).abs().max() < 1e-4 * x.abs().max()


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0.1, 2), st.sampled_from(["l2", "linf"]))
def test_the_projection_is_the_nearest_point_of_the_ball(row: list[float], bound: float, norm: Any) -> None:
    x = torch.tensor(row, dtype=torch.float64)
    p, order = projected(x, bound, norm), 2 if norm == "l2" else torch.inf
    assert torch.linalg.vector_norm(p, order) <= bound + 1e-9
    for seed in range(5):  # no point q of the ball has (x - p)(q - p) > 0
        q = torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q *= bound / torch.linalg.vector_norm(q, order)
        assert float((x - p) @ (q - p)) < 1e-8


def test_no_gradient_is_no_step() -> None:
    assert direction(torch.zeros(3), "l2").tolist() == direction(torch.zeros(3), "linf").tolist() == [0, 0, 0]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_loss_falls_inside_the_ball(pipe: Any, norm: Norm) -> None:
    losses: list[float] = []
    found = perturb(pipe, steps=60, batch_size=4, norm=norm, radius=0.5, on_step=lambda step, loss: losses.append(loss))
    x = encoded(pipe)
    bound = 0.5 * (x.norm() if norm == "l2" else x.square().mean().sqrt())
    assert torch.linalg.vector_norm(found - x, 2 if norm == "l2" else torch.inf) <= bound * 1.001
    assert np.mean(losses[-15:]) < 0.99 * np.mean(losses[:15])


def test_it_is_deterministic_and_goes_through_the_eraser(pipe: Any) -> None:
    base = perturb(pipe)
    opened, shut = make_eraser(), make_eraser(**SHUT)
    assert torch.equal(base, perturb(pipe)) and not torch.equal(base, perturb(pipe, seed=1))
    assert torch.equal(base, perturb(pipe, applied=lambda using: attach(using, shut)))
    assert not torch.equal(base, perturb(pipe, applied=lambda using: attach(using, opened)))
    assert torch.equal(perturb(pipe, radius=0), encoded(pipe)) and not base.requires_grad


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="norm is 'l1': pass 'l2' or 'linf'"):
        perturb(pipe, norm="l1")
    with pytest.raises(SettingsError, match="radius is -1"):
        perturb(pipe, radius=-1)
    with pytest.raises(SettingsError, match="steps is 0"):
        perturb(pipe, steps=0)
    with pytest.raises(SettingsError, match="there are no images"):
        perturb_encoding(pipe, IMAGES[:0], "a")
    with pytest.raises(DataError, match="uint8"):
        perturb_encoding(pipe, IMAGES.astype(np.float32), "a")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="several text encoders or none"):
        perturb(pipelines.stable_diffusion_xl())
