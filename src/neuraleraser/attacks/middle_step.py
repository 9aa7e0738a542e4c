"""Completion from a middle step: the base model begins the picture, and the method comes too late.

A method that steers the first steps alone, where the layout is made, leaves a concept that is there already ("When Are
Concepts Erased from Diffusion Models?", NeurIPS 2025, arXiv 2505.17013, completes from step 5). Here the base model
draws the concept up to a step, and the method is applied from there on, with the prompt that names it. Half-drawn
latents hold much of a picture whoever completes them, so beside an attack's share stands that of the base model, which
completes the same latents with a prompt that leaves the concept out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from neuraleraser.eraser import check_nothing_acts
from neuraleraser.errors import SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling, check_whole


def draw_to_step(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], step: int, sampling: Sampling | None = None
) -> Tensor:
    """Return the latents of images after some steps of their drawing.

    Pass them to `generate` as `latents`, inside `from_step` and at the same number of steps, to complete them. An
    image's latents depend on its prompt and seed alone, at equal batch shape.

    Args:
        pipe: The diffusers pipeline, with a DDIM scheduler, and nothing that erases.
        prompts: One prompt per image.
        seeds: One seed per image.
        step: Steps that are taken, at least one and not all.
        sampling: Steps, guidance and batch size; None: as `default_sampling` says.

    Returns:
        The latents, float32 [N, c, h, w], on the CPU.

    Raises:
        SettingsError: An eraser acts on the pipeline, its scheduler is another, the step is out of range, or `generate`
            refuses.

    Examples:
        >>> half = draw_to_step(pipe, ["a cat", "a dog"], [0, 1], 1, quick)  # of two steps
        >>> with from_step(pipe, 1):
        ...     completed = generate(pipe, ["a cat", "a dog"], [0, 1], quick, latents=half)
        >>> np.array_equal(completed, generate(pipe, ["a cat", "a dog"], [0, 1], quick))
        True
    """
    check_nothing_acts(pipe, "a drawing that a method completes")
    _check_ddim(pipe)
    s = sampling or default_sampling(pipe)
    check_whole("step", step, 1, s.num_inference_steps - 1)
    reals: list[int] = []
    found: list[Tensor] = []

    def keep(using: Any, i: int, timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == step - 1:
            found.append(state["latents"][: reals[-1]].float().cpu())
            using._interrupt = True  # diffusers then leaves out the other steps
        return state

    generate(
        pipe,
        prompts,
        seeds,
        s,
        on_batch_start=lambda first, real: reals.append(real),
        callback_on_step_end=keep,
    )
    pipe._interrupt = False
    return torch.cat(found) if found else torch.zeros(0, 0, 0, 0)


@contextmanager
def from_step(pipe: Any, step: int) -> Iterator[None]:
    """Context manager: calls of a pipeline leave out their first steps, so that latents which are passed are completed.

    Args:
        pipe: The diffusers pipeline, with a DDIM scheduler.
        step: Steps that are left out.

    Returns:
        The context.

    Raises:
        SettingsError: The scheduler is another; in a call: it has no latents, or no more steps than are left out.

    Examples:
        >>> with from_step(pipe, 2):
        ...     generate(pipe, ["a cat"], [0], quick, latents=draw_to_step(pipe, ["a cat"], [0], 1, quick))
        Traceback (most recent call last):
        neuraleraser.errors.SettingsError: 2 steps are left out, and the call has 2: pass more steps
    """
    _check_ddim(pipe)
    check_whole("step", step, 0, 1_000_000)
    scheduler = pipe.scheduler
    kept, whole = dict(vars(scheduler)), scheduler.set_timesteps

    @functools.wraps(whole)
    def later(*args: Any, **settings: Any) -> None:
        whole(*args, **settings)
        if step >= len(scheduler.timesteps):
            raise SettingsError(
                f"{step} steps are left out, and the call has {len(scheduler.timesteps)}: pass more steps"
            )
        scheduler.timesteps = scheduler.timesteps[step:]

    prepare, own = pipe.prepare_latents, vars(pipe).get("prepare_latents")

    @functools.wraps(prepare)
    def prepared(*args: Any, **given: Any) -> Any:
        if inspect.signature(prepare).bind(*args, **given).arguments.get("latents") is None:
            raise SettingsError("from_step completes latents, and the call has none: pass those of draw_to_step")
        return prepare(*args, **given)

    scheduler.set_timesteps, pipe.prepare_latents = later, prepared
    try:
        yield
    finally:
        del pipe.prepare_latents
        if own is not None:  # somebody else's, in place of the class's
            pipe.prepare_latents = own
        vars(scheduler).clear()
        vars(scheduler).update(kept)


def _check_ddim(pipe: Any) -> None:
    """Raise SettingsError for a scheduler whose steps may carry something over to the next."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, DDIMScheduler):
        raise SettingsError(
            f"{type(pipe).__name__} samples with {type(scheduler).__name__}, whose steps may look back: "
            "set pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
