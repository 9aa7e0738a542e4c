"""DNG is its formula, written out with the means and the variance of the reverse step."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import pipelines
from helpers.naive_guidance import GUIDANCE, draw, draw_naively, step_of
from neuraleraser.methods import DynamicNegativeGuidance


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_it_is_the_formula(offset: float):
    pipe = pipelines.stable_diffusion().to(torch.float64)
    log_p: list[float] = [math.log(0.1)]

    def update(c: torch.Tensor, u: torch.Tensor, n: torch.Tensor, step: int) -> torch.Tensor:
        p = math.exp(min(max(log_p[-1], math.log(1e-6)), math.log(0.99)))
        changed = c - 2 * p / (1 - p) * (n - u)
        alpha, beta, alpha_bar = step_of(pipe, step)
        before = alpha_bar / alpha
        if before < 1:
            variance = (1 - before) / (1 - alpha_bar) * beta
            share = beta / math.sqrt(alpha * (1 - alpha_bar))  # of the predicted noise, in the mean of the reverse step
            drawn = u + GUIDANCE * (changed - u)
            nearer = share**2 * float((drawn - u).square().sum() - (drawn - n).square().sum())
            log_p.append(math.log(p) + (5 * nearer + offset) / (2 * variance))
        return changed

    expected = draw_naively(pipe, "x a", "x", update)
    assert max(abs(x - log_p[0]) for x in log_p) > 0.05
    method = DynamicNegativeGuidance("x", "style", "x", strength=2, prior=0.1, temperature=5, offset=offset)
    base = draw(pipe, "x a")
    with method.applied(pipe):
        torch.testing.assert_close(draw(pipe, "x a"), expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 1e-2
