"""Start latents from a reference picture, after RECALL (arXiv 2507.07139, ICLR 2026): the prompt is left as it is.

Published (ryliu68/RECALL), for image-to-image: of a reference's latent z, the adversarial one starts as
0.25 z + 0.75 noise. 50 timesteps, 10 to 990, take turns, 20 steps each, on the squared difference between the erased
model's predictions for both, noised alike: momentum 0.9 over gradients divided by their mean magnitude, then a step of
0.001 by sign. The code goes up this loss. After every fifth turn 0.05 z is added; after each, image-to-image at
strength 0.8 is tried, and the first success ends it.

Kept: one reference an image, a start mixed of it and noise, gradients of predictions through the method, and turns that
success ends. Ours: no picture enters the call. The latents are the noise that sampling starts from, for
`generate(latents=...)`, and two latents that are noised alike say little about it: on the canvas the published loss,
gone down to nothing, drew no reference. So the noise e itself is searched, with Adam: on the straight way from e to z
the guided prediction is to be, at random timesteps, what leads to z. Where it is, sampling from e ends in z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from neuraleraser.attacks.denoising import Context, attacked, check_lessons, check_one_encoder, denoising_target
from neuraleraser.attacks.latents import latents_of
from neuraleraser.families.defaults import default_sampling
from neuraleraser.sampling import Images
from neuraleraser.settings import check_number, check_seed, check_whole


def search_start_latents(
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    *,
    applied: Context = nullcontext,
    guidance: float | None = None,
    share: float = 0.25,
    turns: int = 10,
    steps: int = 20,
    rate: float = 0.05,
    seed: int = 0,
    succeeds: Callable[[Tensor], bool] | None = None,
    on_turn: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Search the noise from which a prompt, through the method, draws each of these pictures.

    Noise can make many a denoiser draw many a picture: beside an attack's share stand that of its start (`steps=0`)
    and that of `random_denoiser`, which on the canvas, after 60 steps, draws the pictures no worse than the model does.
    All images are in one batch, and none depends on the others but for rounding.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        images: Pictures of the concept, uint8 [N, H, W, 3], of the size that the pipeline draws.
        prompts: A prompt for each, with which it will be drawn; it need not name the concept.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        guidance: Scale with which it will be drawn; None: as `default_sampling` says.
        share: Of the picture's latent in the first noise; the noise keeps its spread.
        turns: Turns, after each of which the latents may be tried.
        steps: Steps of each turn.
        rate: Of Adam.
        seed: Of the noise and the timesteps; image i has seed + i.
        succeeds: Called after each turn with the latents; True ends the search.
        on_turn: Called as `on_turn(turn, loss)`, the mean loss of the turn.

    Returns:
        The latents, float32 [N, c, h, w], on the CPU, for `generate(latents=...)`.

    Raises:
        SettingsError: The pipeline has several text encoders or none, there are no images, not as many prompts, or a
            setting is out of range.
        DataError: The images are of another shape or type.

    Examples:
        >>> latents = search_start_latents(pipe, images, ["a cat", "a dog"], turns=1, steps=2)
        >>> generate(pipe, ["a cat", "a dog"], [0, 1], quick, latents=latents).shape
        (2, 64, 64, 3)
    """
    check_one_encoder(pipe)
    check_lessons(images, prompts=prompts)
    scale = default_sampling(pipe).guidance_scale if guidance is None else guidance
    check_number("guidance", scale, 0, 1000)
    check_number("share", share, 0, 1)
    check_number("rate", rate, 0, 1e6, above=True)
    check_whole("turns", turns, 1, 100_000)
    check_whole("steps", steps, 0, 100_000)
    check_seed(seed)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
    last = int(pipe.scheduler.config["num_train_timesteps"])
    shown = latents_of(pipe, images).cpu()
    first = torch.stack([torch.randn(shown.shape[1:], generator=generator) for generator in generators])
    noise = torch.nn.Parameter(share * shown + (1 - share**2) ** 0.5 * first)
    adam = torch.optim.Adam([noise], lr=rate)
    guided = scale > 1 and any(prompts)  # of empty prompts both passes are one

    def latents() -> Tensor:
        end = torch.full((len(images),), last - 1)
        return pipe.scheduler.add_noise(shown, noise.detach(), end)

    with attacked(pipe, applied) as predict:
        for turn in range(turns):
            losses: list[float] = []
            for _ in range(steps):
                times = torch.cat([torch.randint(last, (1,), generator=generator) for generator in generators])
                with torch.enable_grad():
                    noisy, target = denoising_target(pipe, shown, noise, times)
                    found = predict(noisy, times, prompts)
                    if guided:
                        without = predict(noisy, times, [""] * len(images))
                        found = without + scale * (found - without)
                    # A sum over images, so that none's gradient depends on how many there are.
                    loss = (found - target.float()).square().mean((1, 2, 3)).sum()
                    (noise.grad,) = torch.autograd.grad(loss, [noise])
                adam.step()
                losses.append(float(loss.detach()) / len(images))
            if on_turn:
                on_turn(turn, sum(losses) / max(len(losses), 1))
            if succeeds and succeeds(latents()):
                break
    return latents()
