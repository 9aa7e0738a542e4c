"""A denoiser's predictions through a method, with gradients to what an attack changes: what attacks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import SettingsError
from neuraleraser.sampling import Images, check_pictures
from neuraleraser.sites import denoiser

Context = Callable[[Any], AbstractContextManager[Any]]
"""Makes the context of a pipeline in which a method acts, as `Method.applied`."""
Predict = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""Predictions, float32 [B, c, h, w], for noised latents [B, c, h, w], timesteps [B] and prompts, each a new drawing."""


@contextmanager
def attacked(pipe: Any, applied: Context, *inputs: AbstractContextManager[Any]) -> Iterator[Predict]:
    """Context manager: yields the denoiser's predictions through a method, and through the inputs that an attack puts
    in place of others. The method acts on these inputs, so it is entered last. Weights get no gradients; the scheduler
    is left as it was.
    """
    scheduler = pipe.scheduler
    kept = dict(vars(scheduler))
    last = int(scheduler.config["num_train_timesteps"])

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        scheduler.set_timesteps(last)  # a new schedule: a new drawing, for all that is attached
        text, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, False)
        unet: Any = denoiser(pipe)
        x = noisy.to(pipe.device, unet.dtype)
        return unet(x, times.to(pipe.device), encoder_hidden_states=text, return_dict=False)[0].float()

    try:
        with ExitStack() as stack:
            stack.enter_context(frozen(pipe))
            for context in inputs:
                stack.enter_context(context)
            stack.enter_context(applied(pipe))
            yield predict
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(kept)


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Context manager: no gradients are made for the model's own weights."""
    parts = [p for module in (denoiser(pipe), pipe.text_encoder) for p in module.parameters() if p.requires_grad]
    for parameter in parts:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parts:
            parameter.requires_grad_(True)


def denoising_target(pipe: Any, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents [B, c, h, w] noised to timesteps [B], in the denoiser's dtype, and what it is to predict there.

    Raises SettingsError for a scheduler that cannot.
    """
    scheduler, unet = pipe.scheduler, denoiser(pipe)
    x, e, t = (v.to(pipe.device) for v in (latents, noise, times))
    kind = scheduler.config["prediction_type"]
    try:
        target = scheduler.get_velocity(x, e, t) if kind == "v_prediction" else x if kind == "sample" else e
        return scheduler.add_noise(x, e, t).to(unet.dtype), target
    except (ValueError, IndexError) as error:
        raise SettingsError(
            f"{type(scheduler).__name__} does not noise to any timestep: set pipe.scheduler = "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        ) from error


def chosen(prompts: Sequence[str], some: Tensor) -> list[str]:
    """Return some of the prompts, by number."""
    numbers: list[int] = some.tolist()
    return [prompts[i] for i in numbers]


def usable_tokens(pipe: Any) -> Tensor:
    """Return all tokens but special ones [v], in order, on the pipeline's device."""
    special, size = {*pipe.tokenizer.all_special_ids}, len(pipe.text_encoder.get_input_embeddings().weight)
    return torch.tensor([i for i in range(size) if i not in special], device=pipe.device)


def check_one_encoder(pipe: Any) -> None:
    """Raise SettingsError unless the pipeline has one text encoder and a UNet, as Stable Diffusion 1 and 2 have."""
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise SettingsError(f"{type(pipe).__name__} has several text encoders or none: pass one of Stable Diffusion 1")
    if getattr(pipe, "unet", None) is None:
        raise SettingsError(f"{type(pipe).__name__} has no UNet: pass one of Stable Diffusion 1")


def check_lessons(images: Images, **prompts: Sequence[str]) -> None:
    """Raise SettingsError where there are no images or not as many prompts, DataError for other images."""
    check_pictures("images", images)
    if not len(images):
        raise SettingsError("there are no images: pass pictures of the concept")
    for name, some in prompts.items():
        if isinstance(some, str) or not all(isinstance(text, str) for text in some):
            raise SettingsError(f"{name} are no list of texts: pass one for each of the {len(images)} images")
        if len(images) != len(some):
            raise SettingsError(f"{len(images)} images, {len(some)} {name}: pass one for each")
