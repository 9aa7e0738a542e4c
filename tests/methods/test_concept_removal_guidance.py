"""CRG is its formula, written out with the schedule's alphas and betas."""

from __future__ import annotations

import pytest
import torch

from helpers import pipelines
from helpers.naive_guidance import draw, draw_naively, step_of
from neuraleraser.methods import ConceptRemovalGuidance


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("threshold", [0.0, -0.02])
def test_it_is_the_formula(prediction: str, threshold: float):
    pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    acted: list[bool] = []
    past: list[float] = []

    def update(c: torch.Tensor, u: torch.Tensor, n: torch.Tensor, step: int) -> torch.Tensor:
        alpha, beta, alpha_bar = step_of(pipe, step)
        now = float((c - u).square().sum() - (c - n).square().sum())
        presence = now / 2 + sum(past)
        past.append(beta / (2 * alpha * (1 - alpha_bar)) * now)
        omega = (presence - threshold) / float((n - u).square().sum())
        acted.append(presence > threshold)
        return c - 3 * omega * (n - u) if acted[-1] else c

    expected = draw_naively(pipe, "x a", "x", update)
    assert any(acted)
    method = ConceptRemovalGuidance("x", "style", "x", strength=3.0, threshold=threshold)
    base = draw(pipe, "x a")
    with method.applied(pipe):
        torch.testing.assert_close(draw(pipe, "x a"), expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 1e-2


def test_it_does_nothing_where_the_prompt_is_empty():
    """The limit that its docstring names."""
    pipe = pipelines.stable_diffusion()
    base = draw(pipe, "")
    with ConceptRemovalGuidance("x", "style", "x").applied(pipe):
        assert torch.equal(draw(pipe, ""), base)
