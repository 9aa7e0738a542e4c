"""Sampling written out, in which a test changes the conditional prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers import pipelines

STEPS, GUIDANCE = 5, 4.0


def _latents() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def draw(pipe: Any, prompt: str) -> Tensor:
    """Final latents by the pipeline itself."""
    latents = _latents().to(pipe.unet.dtype)
    return pipelines.run(pipe, 0, steps=STEPS, guidance=GUIDANCE, prompt=[prompt], latents=latents)


def step_of(pipe: Any, step: int) -> tuple[float, float, float]:
    """(alpha, beta, the product of alphas up to here) of a step, as of a chain of that many steps."""
    t = int(pipe.scheduler.timesteps[step])
    last = step + 1 == len(pipe.scheduler.timesteps)
    here = float(pipe.scheduler.alphas_cumprod[t])
    before = 1.0 if last else float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[step + 1])])
    return here / before, 1 - here / before, here


@torch.no_grad()
def draw_naively(
    pipe: Any, prompt: str, concept: str, update: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Final latents where `update` makes a new one of the noise predicted for the prompt, given those for the empty
    prompt and the concept's, and the step's number."""
    scheduler, x = pipe.scheduler, _latents()
    texts = [pipe.encode_prompt([text], "cpu", 1, False)[0] for text in (prompt, "", concept)]
    scheduler.set_timesteps(STEPS)
    for step, t in enumerate(scheduler.timesteps):
        share = scheduler.alphas_cumprod[int(t)].double()
        predicted = [pipe.unet(x, t, encoder_hidden_states=text).sample for text in texts]
        if scheduler.config.prediction_type == "v_prediction":
            predicted = [share.sqrt() * v + (1 - share).sqrt() * x for v in predicted]
        c, u, n = predicted
        guided = u + GUIDANCE * (update(c, u, n, step) - u)
        if scheduler.config.prediction_type == "v_prediction":
            guided = (guided - (1 - share).sqrt() * x) / share.sqrt()
        x = scheduler.step(guided, t, x).prev_sample
    return x
