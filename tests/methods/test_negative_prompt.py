"""A negative prompt by guidance is the pipeline's own."""

from __future__ import annotations

import torch

from helpers import pipelines
from helpers.naive_guidance import GUIDANCE, STEPS, draw
from neuraleraser.methods import NegativePrompt


def test_it_is_the_pipelines_own():
    pipe = pipelines.stable_diffusion().to(torch.float64)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = {"prompt": ["x a"], "negative_prompt": ["x"], "latents": latents}
    expected = pipelines.run(pipe, 0, steps=STEPS, guidance=GUIDANCE, **own)
    base = draw(pipe, "x a")
    with NegativePrompt("x", "style", "x").applied(pipe):
        torch.testing.assert_close(draw(pipe, "x a"), expected, atol=1e-5, rtol=1e-5)
        alone = pipelines.run(pipe, 0, steps=STEPS, guidance=1.0, prompt=["x a"], latents=latents)
    assert (base - expected).abs().max() > 1e-2
    assert torch.equal(alone, pipelines.run(pipe, 0, steps=STEPS, guidance=1.0, prompt=["x a"], latents=latents))
