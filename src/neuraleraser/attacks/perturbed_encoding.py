"""Projected gradient descent (Madry et al., ICLR 2018, arXiv 1706.06083) on the encoding of a prompt.

Published, for images and a classifier: steps of the gradient's sign in an L-inf ball, or of the gradient over its norm
in an L2 ball, each followed by a projection onto the ball, from a random point of it.

Ours: it is a prompt's encoding [1, n, d], as `pipe(prompt_embeds=...)` takes it, that is changed; the loss is the
denoiser's own on pictures of the concept, through the method, and is to fall; the first point is the encoding itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.attacks.denoising import Context, attacked, check_lessons, check_one_encoder, denoising_target
from neuraleraser.attacks.encoded_text import encoded_prompts
from neuraleraser.attacks.latents import latents_of
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import Images
from neuraleraser.settings import check_number, check_seed, check_whole

Norm = Literal["l2", "linf"]
_REACH = 2.5
"""Radii that all steps together go, as published: enough to come to any point of the ball, and back from its edge."""


def perturb_encoding(
    pipe: Any,
    images: Images,
    prompt: str,
    *,
    applied: Context = nullcontext,
    radius: float = 0.5,
    norm: Norm = "l2",
    steps: int = 100,
    batch_size: int = 4,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Change a prompt's encoding a little, so that the denoiser predicts pictures of a concept.

    The radius is relative: in L2 to the norm of the encoding, in L-inf, element by element, to the root of its mean
    square. So at equal radii the ball in L2 holds that in L-inf.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        images: Pictures of the concept, uint8 [N, H, W, 3].
        prompt: The prompt, which need not name the concept.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        radius: Of the ball around the encoding; 0 leaves it as it is.
        norm: "l2" or "linf".
        steps: Steps, each of 2.5 radii divided by their number.
        batch_size: Pictures in a step.
        seed: Of the noise and the order.
        on_step: Called as `on_step(step, loss)`.

    Returns:
        The embeddings [1, n, d], for `encoded_prompts` and for `pipe(prompt_embeds=...)`.

    Raises:
        SettingsError: The pipeline has several text encoders or none, there are no images, or a setting is out of
            range.
        DataError: The images are of another shape or type.

    Examples:
        >>> found = perturb_encoding(pipe, images, "a cat", steps=2, batch_size=2)
        >>> found.shape
        torch.Size([1, 24, 128])
        >>> with encoded_prompts(pipe, {"a cat": found}):
        ...     drawn = generate(pipe, ["a cat"], [0], quick)
    """
    check_one_encoder(pipe)
    check_lessons(images)
    check_number("radius", radius, 0, 100)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_whole(name, value, 1, 100_000)
    check_seed(seed)
    if norm not in get_args(Norm):
        raise SettingsError(f"norm is {norm!r}: pass 'l2' or 'linf'")
    generator = torch.Generator().manual_seed(seed)
    latents = latents_of(pipe, images).cpu()
    last = int(pipe.scheduler.config["num_train_timesteps"])
    with torch.no_grad():
        center = pipe.encode_prompt([prompt], pipe.device, 1, False)[0].detach().float()
    bound = radius * float(center.norm() if norm == "l2" else center.square().mean().sqrt())
    offset = torch.zeros_like(center, requires_grad=True)
    encodings = {prompt: center}
    with attacked(pipe, applied, encoded_prompts(pipe, encodings)) as predict:
        for step in range(steps):
            some = torch.randint(len(latents), (batch_size,), generator=generator)
            times = torch.randint(last, (batch_size,), generator=generator)
            noise = torch.randn(latents[some].shape, generator=generator)
            noisy, target = denoising_target(pipe, latents[some], noise, times)
            with torch.enable_grad():
                encodings[prompt] = center + offset
                loss = F.mse_loss(predict(noisy, times, [prompt] * batch_size), target.float())
                (gradient,) = torch.autograd.grad(loss, offset)
            offset.data = projected(offset.data - _REACH * bound / steps * direction(gradient, norm), bound, norm)
            if on_step:
                on_step(step, float(loss.detach()))
    return (center + offset.detach()).cpu()


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the steepest step of length 1 in a norm; zeros for a gradient of zeros."""
    return gradient.sign() if norm == "linf" else gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)


def projected(offset: Tensor, bound: float, norm: Norm) -> Tensor:
    """Return the nearest point of the ball of this radius around 0."""
    if norm == "linf":
        return offset.clamp(-bound, bound)
    length = float(offset.norm())
    return offset if length <= bound else offset * (bound / length)
