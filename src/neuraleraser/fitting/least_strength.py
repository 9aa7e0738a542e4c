"""The strength of image-to-image from which an eraser takes its concept out of a start image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from neuraleraser.eraser import Eraser, attach
from neuraleraser.families.opening import image_to_image
from neuraleraser.fitting.noised_pictures import NOISE_LEVELS, noised_states
from neuraleraser.fitting.pictures import Pictures
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Strengths that are tried, the lowest first."""
PICTURES = 8
"""Pictures that each is tried on."""
REMAINS = 0.1
"""Share of the pictures in which the concept may stay."""


def least_strength(pipe: Any, eraser: Eraser, shows: Pictures, sampling: Sampling) -> float | None:
    """Return the lowest strength at which the image gate no longer sees the concept in what comes of pictures of it.

    The images start from pictures with the concept, have an empty prompt, and are made with the eraser. The gate looks
    at them at the lowest level of noise, as it does at start images. Only pictures in which it sees the concept count.

    Returns None where it sees none, or where the concept stays at each strength.
    """
    gate = eraser.image_gate
    if gate is None:
        return None

    def seen(pictures: Pictures) -> torch.Tensor:
        """Return whether the gate sees the concept in each picture [N]."""
        states = noised_states(pipe, gate.site, pictures, levels=NOISE_LEVELS[-1:], batch_size=sampling.batch_size)
        x = states.values[:, 0].float()
        return gate(x, states.times.expand(len(x)), states.grid) > 0

    first = Pictures(shows.images[:PICTURES], [""] * len(shows.images[:PICTURES]), list(shows.seeds[:PICTURES]))
    known = seen(first)
    images = first.images[known.numpy()]
    if not len(images):
        return None
    start = image_to_image(pipe)
    seeds = [seed for seed, is_known in zip(first.seeds, known.tolist(), strict=True) if is_known]
    start.set_progress_bar_config(disable=True)
    for strength in STRENGTHS:
        with attach(start, eraser):
            made = generate(start, [""] * len(images), seeds, replace(sampling, strength=strength), image=images)
        if float(seen(Pictures(made, [""] * len(made), seeds)).float().mean()) <= REMAINS:
            return strength
    return None
