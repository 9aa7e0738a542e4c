"""A scheduler's side of sampling: the latents it makes, and what it trains a denoiser to predict."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import SettingsError


@contextmanager
def scheduler_steps(pipe: Any, on_latents: Callable[[Tensor], None]) -> Iterator[None]:
    """Context manager: calls `on_latents` with the latents after each step of the scheduler, lastly with the finished.

    Not every pipeline has diffusers' `callback_on_step_end`, but each steps its scheduler."""
    plain = pipe.scheduler.step

    @functools.wraps(plain)  # pipelines read its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        on_latents(out[0])
        return out

    pipe.scheduler.step = step
    try:
        yield
    finally:
        del pipe.scheduler.step


def input_and_target(scheduler: Any, x_0: Tensor, noise: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(what the denoiser is given at t, what it should predict), both shaped as x_0, by diffusers' scheduler.

    Raises SettingsError for a kind of scheduler that is not known.
    """
    own = copy.copy(scheduler)
    for name in ("_step_index", "_begin_index"):  # where sampling left them; by value from here on
        if hasattr(own, name):
            setattr(own, name, None)
    timestep = torch.as_tensor([t], device=x_0.device)
    timestep = timestep.to(scheduler.timesteps.dtype)
    if hasattr(own, "scale_noise"):
        return own.scale_noise(x_0, timestep, noise), noise - x_0
    kind = own.config.get("prediction_type", "epsilon")

    def mixture(x: Tensor, n: Tensor) -> Tensor:
        """A linear map: alpha x + sigma n."""
        return own.scale_model_input(own.add_noise(x, n, timestep.expand(len(x))), timestep[0])

    state = mixture(x_0, noise)
    if kind == "epsilon":
        return state, noise
    if kind == "sample":
        return state, x_0
    if kind == "flow_prediction":
        return state, noise - x_0
    if kind == "v_prediction":  # alpha noise - sigma x_0 (Salimans and Ho 2022)
        return state, mixture(noise, -x_0)
    raise SettingsError(f"what {type(scheduler).__name__} predicts as {kind!r} is not known: pass another scheduler")
