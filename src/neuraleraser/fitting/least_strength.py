"""The strength of image-to-image from which an eraser takes its concept out of a start image."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from neuraleraser.eraser import Eraser, attach
from neuraleraser.families.opening import image_to_image
from neuraleraser.fitting.image_gate import ImageFit
from neuraleraser.fitting.noised_pictures import NOISE_LEVELS, noised_states
from neuraleraser.fitting.pictures import Pictures
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Strengths that are tried, by bisection: more noise leaves less of a picture."""
PICTURES = 12
"""Pictures that each is tried on."""
REMAINS = 0.25
"""Share of the images that may be in doubt: of those without the concept, a tenth are."""


def least_strength(pipe: Any, eraser: Eraser, picture: ImageFit, sampling: Sampling) -> float | None:
    """Return the lowest strength at which the image gate's features see no concept in what comes of pictures of it.

    Both must lack it: the images that start from these pictures with an empty prompt, made with the eraser, and those
    that the base model makes when it is asked for what stands in the concept's place. The eraser moves predictions in
    the direction that its gate looks in, so that its own images alone would flatter it.

    The features look at the lowest level of noise, with a lower bound than the gate's (`ImageFit.doubt`). Only pictures
    in which they see the concept count.

    Returns 1 where the concept stays at each strength that is tried, None where they see no concept in any picture.
    """
    gate, guided = eraser.image_gate, eraser.guided
    if gate is None or guided is None:
        return None

    def seen(pictures: Pictures) -> torch.Tensor:
        """Return True for each picture in which the concept may be [N]."""
        states = noised_states(pipe, gate.site, pictures, levels=NOISE_LEVELS[-1:], batch_size=sampling.batch_size)
        x = states.values[:, 0].float()
        return gate.evidence(x, states.grid) > picture.doubt

    first = picture.shows[:PICTURES]
    known = seen(replace(first, prompts=[""] * len(first.images)))
    images = first.images[known.numpy()]
    if not len(images):
        return None
    start = image_to_image(pipe)
    seeds = [seed for seed, is_known in zip(first.seeds, known.tolist(), strict=True) if is_known]
    start.set_progress_bar_config(disable=True)
    sampling = replace(sampling, pad_last_batch=False)

    def remains(prompt: str, strength: float, using: AbstractContextManager[object]) -> bool:
        """Return True if too many of the images made with a prompt show the concept."""
        prompts = [prompt] * len(images)
        with using:
            made = generate(start, prompts, seeds, replace(sampling, strength=strength), image=images)
        return float(seen(Pictures(made, [""] * len(made), seeds)).float().mean()) > REMAINS

    def lacking(strength: float) -> bool:
        return not remains(guided.prompts[0], strength, nullcontext())

    def erased(strength: float) -> bool:
        return not remains("", strength, attach(start, eraser))

    tried = [strength for strength in STRENGTHS if sampling.num_inference_steps * strength >= 1]  # with a step to go
    tried = tried[bisect_left(tried, True, key=lacking) :]
    if not tried or erased(tried[0]):  # mostly it does
        return tried[0] if tried else 1.0
    first = bisect_left(tried, True, lo=1, key=erased)
    return tried[first] if first < len(tried) else 1.0
