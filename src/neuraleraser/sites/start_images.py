"""Start images as latents: as the autoencoder gave them, and noised as the denoiser is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.sites.modules import unwrap
from neuraleraser.sites.schedulers import input_and_target


def last_of_encoder(vae: Any) -> nn.Module | None:
    """Return the module of an autoencoder whose output is the latents' mean beside its log variance, or they alone;
    None of others."""
    root = unwrap(vae)
    for name in ("quant_conv", "encoder"):
        found = getattr(root, name, None)
        if isinstance(found, nn.Module) and callable(getattr(root, "encode", None)):
            return found
    return None


ROUNDING = 1 / 25
"""Share of a schedule by which a call may start later than its strength says, as pipelines round down to whole steps:
a step of the usual 25, with which `least_strength` is measured."""


def strength_of(variables: Mapping[str, Any], schedule: Any) -> float | None:
    """Return the share of the way back to noise that a call takes its start image, from its local variables and the
    scheduler's timesteps; None where it has no strength.

    With few steps, or where `denoising_start` decides, that is not what its argument `strength` says.
    """
    said, taken = variables.get("strength"), variables.get("timesteps")
    if not isinstance(said, (int, float)):
        return None
    if not isinstance(taken, Tensor) or not isinstance(schedule, Tensor) or not len(schedule):
        return float(said)
    share = len(taken) / len(schedule)
    if variables.get("denoising_start") is not None:
        return min(1.0, share)
    return float(said) if share >= said - ROUNDING else share


def kinds_encoded(pipeline: Any, masked: bool, strength: float) -> int:
    """Return how many pictures a pipeline's call encodes for each start image: with a mask it encodes the start image,
    and behind it the same with the masked part left out.

    A UNet with channels for that one is given no start image at full strength.
    """
    channels = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "in_channels", 0)
    latents = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "latent_channels", 0)
    return 2 if masked and not (strength >= 1 and channels > latents) else 1


def start_latents(vae: Any, outputs: Sequence[Tensor], images: int, kinds: int = 1) -> Tensor | None:
    """Return the latents [images, C, h, w] of a call's start images, without noise.

    outputs: what `last_of_encoder` gave in the call, in order: the start images come first, behind them as many of each
    further kind (`kinds_encoded`). Where there are fewer than images, they come again, as in diffusers. None where they
    are not known: autoencoders of other kinds, which scale each channel, and pictures that were taken apart in tiles.
    """
    config: Any = getattr(vae, "config", {})
    channels, scale = config.get("latent_channels"), config.get("scaling_factor")
    if channels is None or scale is None or config.get("latents_mean") is not None:
        return None
    if not outputs or len({x.shape[1:] for x in outputs}) > 1 or outputs[0].ndim != 4:
        return None
    found = torch.cat(list(outputs))
    mean = found[: len(found) // kinds, :channels] if len(found) % kinds == 0 else found[:0]
    if mean.shape[1] != channels or not len(mean) or images % len(mean):
        return None
    return (mean - (config.get("shift_factor") or 0.0)).mul(scale).repeat(images // len(mean), 1, 1, 1)


def latents_given(vae: Any, image: Any, images: int) -> Tensor | None:
    """Return the latents [images, C, h, w] of start images that are given as latents, which nothing encodes; None of
    others."""
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != channels or images % max(1, len(image)):
        return None
    return image.repeat(images // len(image), 1, 1, 1)


def noised(scheduler: Any, latents: Tensor, state: Tensor, timestep: Tensor) -> Tensor | None:
    """Return latents [n, C, h, w] noised to a timestep of the schedule, as rows of the denoiser's `state` [n, ...] are.

    The noise is the same for every image and call, so that what an image is seen in depends on nothing else. Channels
    that the state has beside them, such as a mask, are kept. None where the state has another shape.
    """
    seed = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape[1:], generator=seed).to(latents).expand_as(latents)
    x, _ = input_and_target(scheduler, latents, noise, float(timestep))
    if state.ndim == 3 and x.numel() == state.numel():  # a transformer's, packed two by two
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(state.shape).to(state)
    if state.ndim != 4 or x.shape[2:] != state.shape[2:] or x.shape[1] > state.shape[1]:
        return None
    return torch.cat([x.to(state), state[:, x.shape[1] :]], 1)
