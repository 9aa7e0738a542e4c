"""A scheduler's side of sampling: the latents it makes, and what it trains a denoiser to predict."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def with_many_steps(scheduler: Any) -> Any:
    """Return a copy of a scheduler that goes through 50 steps, or as many as it can."""
    own, config = copy.deepcopy(scheduler), scheduler.config
    shift = {"mu": config.get("base_shift", 0.5)} if config.get("use_dynamic_shifting") else {}
    own.set_timesteps(min(50, config.get("original_inference_steps") or 50), **shift)
    return own


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


@dataclass(frozen=True)
class NoiseLevel:
    """Noise of a state at one timestep.

    signal_to_noise: squared share of the clean latents, divided by that of the noise. slope: change of the noise that a
    prediction implies, per change of the prediction: 1 where it is the noise itself.
    """

    signal_to_noise: float
    slope: float


def noise_level(scheduler: Any, timestep: Tensor) -> NoiseLevel:
    """Return the noise level of a denoiser's forward, by the timestep it was given [] or [B], the same for all rows.

    Some pipelines give their denoiser the scheduler's timestep divided by 1000. The scheduler holds the timesteps of
    the call, and the nearest is taken, as half precision rounds.
    """
    times, given = scheduler.timesteps.double().cpu(), timestep.flatten()[0].double().cpu()
    nearest = [times[(times - scale * given).abs().argmin()] for scale in (1, 1000)]
    t = min(zip(nearest, (1, 1000), strict=True), key=lambda found: float((found[0] - found[1] * given).abs()))[0]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    # state = a x_0 + s noise, prediction = p x_0 + q noise
    a, p = (float(x) for x in input_and_target(scheduler, one, zero, float(t)))
    s, q = (float(x) for x in input_and_target(scheduler, zero, one, float(t)))
    return NoiseLevel((a / s) ** 2, a / (q * a - p * s))
