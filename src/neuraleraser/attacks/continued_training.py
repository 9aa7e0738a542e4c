"""Continued training as an attack: an owner of the model trains a LoRA on pictures of the concept, with the method on.

What a method hides, a few steps may uncover (MemoRa, arXiv 2510.03263, brings concepts back with LoRAs); the question
is how many. Pictures teach a model anew what it never knew, too, so beside an attack's share stands that of the oracle:
the base model, trained alike on the same pictures with prompts that leave the concept out, and asked for that.

As in diffusers' `train_text_to_image_lora.py`: matrices of a low rank are added to all attention projections of the
denoiser, the first of each pair random, the second 0; the loss is the denoiser's own, at random timesteps. The rate is
higher than there (1e-4), for few steps, and stays the same: a shorter training is the beginning of a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuraleraser.attacks.denoising import (
    Context,
    attacked,
    check_lessons,
    check_one_encoder,
    chosen,
    denoising_target,
)
from neuraleraser.attacks.latents import latents_of
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import Images
from neuraleraser.settings import check_number, check_seed, check_whole
from neuraleraser.sites import denoiser, unwrap

_PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")


def train_lora(
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    *,
    applied: Context = nullcontext,
    rank: int = 8,
    steps: int = 80,
    batch_size: int = 8,
    rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train a LoRA of the denoiser on pictures of a concept, through everything that a method does.

    The pipeline's own weights stay as they are.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        images: Pictures of the concept, uint8 [N, H, W, 3], of the size that the pipeline draws.
        prompts: A prompt for each, which names the concept as an owner of the model would.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        rank: Rank of each pair of matrices.
        steps: Steps of Adam.
        batch_size: Pictures in a step.
        rate: Of Adam.
        seed: Of the first matrices, the noise and the order.
        on_step: Called as `on_step(step, loss)`.

    Returns:
        The LoRA in the form that `pipe.load_lora_weights` takes: float32 [rank, inputs] and [outputs, rank] for each
        projection, on the CPU.

    Raises:
        SettingsError: The pipeline has several text encoders or none, its denoiser no attention projections of
            diffusers' names, there are no images, not as many prompts, or a setting is out of range.
        DataError: The images are of another shape or type.

    Examples:
        >>> lora = train_lora(pipe, images, ["a cat", "a dog"], rank=2, steps=2, batch_size=2)
        >>> with lora_added(pipe, lora):
        ...     changed = generate(pipe, ["a cat"], [0], quick)
        >>> np.array_equal(changed, generate(pipe, ["a cat"], [0], quick))
        False
    """
    check_one_encoder(pipe)
    check_lessons(images, prompts=prompts)
    check_whole("rank", rank, 1, 4096)
    check_whole("steps", steps, 0, 1_000_000)
    check_whole("batch_size", batch_size, 1, 4096)
    check_number("rate", rate, 0, 1e6, above=True)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    lora = _first_lora(pipe, rank, generator)
    adam = torch.optim.Adam(lora.values(), lr=rate)
    latents = latents_of(pipe, images).cpu()
    last = int(pipe.scheduler.config["num_train_timesteps"])
    with attacked(pipe, applied, lora_added(pipe, lora)) as predict:
        for step in range(steps):
            some = torch.randint(len(latents), (batch_size,), generator=generator)
            times = torch.randint(last, (batch_size,), generator=generator)
            noise = torch.randn(latents[some].shape, generator=generator)
            noisy, target = denoising_target(pipe, latents[some], noise, times)
            with torch.enable_grad():
                loss = F.mse_loss(predict(noisy, times, chosen(prompts, some)), target.float())
                adam.zero_grad(set_to_none=True)
                loss.backward()
            adam.step()
            if on_step:
                on_step(step, float(loss.detach()))
    return {name: x.detach().cpu() for name, x in lora.items()}


@contextmanager
def lora_added(pipe: Any, lora: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: a LoRA's matrices are added to the denoiser's projections, and its weights stay as they are.

    A method that is entered inside the context acts on what they give. peft would put modules of its own in place of
    the projections, which methods that are made for these do not find.

    Args:
        pipe: The diffusers pipeline.
        lora: What `train_lora` returned.

    Returns:
        The context.

    Raises:
        SettingsError: The LoRA is of another denoiser.

    Examples:
        >>> lora = train_lora(pipe, images, ["a cat", "a dog"], rank=2, steps=0)
        >>> with lora_added(pipe, lora):  # before the first step it adds nothing
        ...     same = generate(pipe, ["a cat"], [0], quick)
        >>> np.array_equal(same, generate(pipe, ["a cat"], [0], quick))
        True
    """
    projections = _projections(pipe)
    expected = {name for projection in projections for name in _names(projection)}
    if lora.keys() != expected or not all(_fits(lora, name, module) for name, module in projections.items()):
        raise SettingsError(
            f"the LoRA does not fit the {len(projections)} attention projections of this {type(pipe).__name__}: train "
            "one on the pipeline at hand"
        )
    handles = []
    try:
        for name, module in projections.items():
            down, up = (lora[key] for key in _names(name))
            handles.append(module.register_forward_hook(_adding(down, up)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a forward hook that adds to a projection's output what two matrices make of its input."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        return output + F.linear(F.linear(x, down.to(x)), up.to(x))

    return add


def _fits(lora: Mapping[str, Tensor], name: str, module: nn.Linear) -> bool:
    """Tell whether the matrices for a projection have its shape."""
    down, up = (lora[key] for key in _names(name))
    expected = [[len(down), module.in_features], [module.out_features, len(down)]]
    return [list(down.shape), list(up.shape)] == expected


def _projections(pipe: Any) -> dict[str, nn.Linear]:
    """Return the attention projections of the denoiser by name. Raises SettingsError where it has none."""
    model = unwrap(denoiser(pipe))
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_PROJECTIONS)
    }
    if not found:
        raise SettingsError(
            f"{type(model).__name__} has no attention projections called to_q, to_k, to_v or to_out.0, which a LoRA is "
            "added to: pass a pipeline whose denoiser has some, such as Stable Diffusion's"
        )
    return found


def _first_lora(pipe: Any, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Return matrices that add nothing yet, to train."""
    made: dict[str, nn.Parameter] = {}
    for name, module in _projections(pipe).items():
        down, up = _names(name)
        first = torch.randn(rank, module.in_features, generator=generator) / rank
        made[down] = nn.Parameter(first.to(pipe.device))
        made[up] = nn.Parameter(torch.zeros(module.out_features, rank, device=pipe.device))
    return made


def _names(projection: str) -> tuple[str, str]:
    """Return the names of a projection's two matrices in diffusers' files."""
    return f"unet.{projection}.lora_A.weight", f"unet.{projection}.lora_B.weight"
