"""SLD is the formula of diffusers' pipeline, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.naive_guidance import draw, draw_naively
from neuraleraser.methods import SafeLatentDiffusion

METHOD = SafeLatentDiffusion("x", "style", "x", strength=40.0, threshold=0.02, warm_up=2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_is_the_formula(prediction: str):
    pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    momentum: Any = 0.0
    shares: list[torch.Tensor] = []

    def update(c: torch.Tensor, u: torch.Tensor, n: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal momentum
        scale = ((c - n).abs() * 40).clamp(max=1.0)
        scale = torch.where((c - n) >= 0.02, torch.zeros_like(scale), scale)
        shares.append(scale)
        gamma = (n - u) * scale + 0.5 * momentum
        momentum = 0.7 * momentum + (1 - 0.7) * gamma
        return c - gamma if step >= 2 else c

    expected = draw_naively(pipe, "x a", "x", update)
    scales = torch.stack(shares)
    assert (scales == 0).any() and (scales == 1).any() and ((scales > 0) & (scales < 1)).any()
    base = draw(pipe, "x a")
    with METHOD.applied(pipe):
        torch.testing.assert_close(draw(pipe, "x a"), expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 1e-2


def test_steps_of_the_warm_up_change_nothing():
    pipe = pipelines.stable_diffusion()
    base = draw(pipe, "x a")
    with SafeLatentDiffusion("x", "style", "x", warm_up=5).applied(pipe):
        assert torch.equal(draw(pipe, "x a"), base)
    with SafeLatentDiffusion("x", "style", "x", warm_up=4).applied(pipe):
        assert not torch.equal(draw(pipe, "x a"), base)
