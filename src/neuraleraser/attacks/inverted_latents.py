"""Attack by inverted latents: the noise from which the model, asked for nothing, draws a given picture.

No word names the concept and no picture enters the call (as in TINA). But deterministic sampling can be run backwards
on any denoiser, a random one too, so a picture that comes back proves nothing by itself: beside an attack's share
always stands that of `random_denoiser`.

A step of DDIM without clipping is linear in the state and the prediction: x' = a x + b f(x, t). Backwards,
x = (x' - b f(x, t)) / a, which is solved by putting x' for x and repeating (as Pan et al., ICCV 2023).
diffusers' `DDIMInverseScheduler` takes the first of these steps alone, and takes the prediction for one of the noise
level before; the canvas, which predicts velocity, brings few pictures back with it (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from neuraleraser.attacks.latents import latents_of
from neuraleraser.eraser import check_nothing_acts
from neuraleraser.errors import SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.sampling import Images, batch_size_for, check_pictures, generate
from neuraleraser.settings import Sampling, check_seed
from neuraleraser.sites import DenoiserCall, denoiser, denoiser_calls, denoisers, replay, unwrap

_REPEATS = 2
"""Forwards in which a step backwards is solved: with two the canvas brings pictures back as its autoencoder does."""


def inverted_latents(pipe: Any, images: Images, sampling: Sampling | None = None) -> Tensor:
    """Return the noise from which `pipe`, with an empty prompt, draws each of these pictures.

    Pass it to `generate` as `latents`, at the same number of steps. It takes two forwards without guidance a step, as
    long as drawing. An image's latents depend on the image alone, at equal batch shape.

    Args:
        pipe: The diffusers pipeline, with a DDIM scheduler that does not clip, and nothing that erases.
        images: Pictures of the pipeline's own size, uint8 [N, H, W, 3].
        sampling: Steps and batch size; None: as `default_sampling` says.

    Returns:
        The latents, float32 [N, c, h, w], on the CPU.

    Raises:
        SettingsError: An eraser acts on the pipeline, or its scheduler, its autoencoder or its denoiser cannot be run
            backwards.
        DataError: The images are of another shape or type.

    Examples:
        >>> latents = inverted_latents(pipe, images, quick)
        >>> latents.shape
        torch.Size([2, 8, 16, 16])
        >>> generate(pipe, ["", ""], [0, 1], quick, latents=latents).shape
        (2, 64, 64, 3)
    """
    check_nothing_acts(pipe, "an inversion")
    _check_invertible(pipe)
    check_pictures("images", images)
    s = sampling or default_sampling(pipe)
    size = batch_size_for(len(images), s)
    found: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(images), size):
            real = min(size, len(images) - first)
            index = [*range(first, first + real), *[first + real - 1] * (size - real)]
            found.append(_inverted(pipe, latents_of(pipe, images[index]), s)[:real])
    return torch.cat(found) if found else torch.zeros(0, 0, 0, 0)


def random_denoiser(pipe: Any, seed: int = 0) -> Any:
    """Return the pipeline with a freshly initialised denoiser of the same configuration: the control of an inversion.

    Args:
        pipe: The diffusers pipeline.
        seed: Seed of the new weights.

    Returns:
        A pipeline of its own; all other parts are shared.

    Raises:
        SettingsError: The pipeline has several denoisers, or the seed is out of range.

    Examples:
        >>> control = random_denoiser(pipe, 3)
        >>> control.vae is pipe.vae, control.unet is pipe.unet
        (True, False)
    """
    check_seed(seed)
    names = denoisers(pipe)
    if len(names) != 1:
        raise SettingsError(
            f"{type(pipe).__name__} denoises with {', '.join(names)}: pass a pipeline with one denoiser"
        )
    model: Any = unwrap(denoiser(pipe))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model).from_config(model.config).to(model.device).eval()
    if fresh.dtype != model.dtype:
        fresh = fresh.to(model.dtype)
    flags = {name: pipe.config[name] for name in signature(type(pipe)).parameters if name not in pipe.components}
    made = type(pipe)(**{**pipe.components, names[0]: fresh}, **flags)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def _check_invertible(pipe: Any) -> None:
    """Raise SettingsError for a pipeline that cannot be run backwards."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, DDIMScheduler):
        raise SettingsError(
            f"{type(pipe).__name__} samples with {type(scheduler).__name__}, and DDIM alone can be run backwards: set "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
        )
    if scheduler.config["clip_sample"] or scheduler.config["thresholding"]:
        raise SettingsError(
            "the scheduler clips what it predicts, which cannot be run backwards: set pipe.scheduler = "
            "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)"
        )
    if "scaling_factor" not in getattr(getattr(pipe, "vae", None), "config", {}):
        raise SettingsError(f"{type(pipe).__name__} has no autoencoder with a scaling factor: pass a latent pipeline")


def _inverted(pipe: Any, latents: Tensor, s: Sampling) -> Tensor:
    """Return the noise at the first timestep of a batch of latents [N, c, h, w], on the CPU."""
    conditioning = _conditioning(pipe, len(latents), s).conditioning
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(s.num_inference_steps, device=latents.device)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    dtype: Any = unwrap(denoiser(pipe)).dtype
    for t in scheduler.timesteps.flip(0):
        a, b = (float(scheduler.step(f, t, x).prev_sample) for f, x in ((zero, one), (one, zero)))
        before = latents
        for _ in range(_REPEATS):
            prediction = replay(pipe, before.to(dtype), t, conditioning).float()
            if prediction.shape != latents.shape:
                raise SettingsError(
                    f"{type(pipe).__name__}'s denoiser turns {list(latents.shape)} into {list(prediction.shape)}, and "
                    "only one that predicts as much as it is given can be run backwards: pass another pipeline"
                )
            before = (latents - b * prediction) / a
        latents = before
    return latents.cpu()


def _conditioning(pipe: Any, count: int, s: Sampling) -> DenoiserCall:
    """Return a denoiser's forward as the pipeline makes it with empty prompts and no guidance."""
    calls: list[DenoiserCall] = []
    once = replace(s, num_inference_steps=1, guidance_scale=1.0, batch_size=count)
    with denoiser_calls(pipe, calls.append):
        generate(pipe, [""] * count, [0] * count, once)
    return calls[0]
