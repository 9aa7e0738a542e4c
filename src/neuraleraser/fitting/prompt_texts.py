"""Prompts as a denoiser is given them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Text, denoiser_calls, text_of

_START_SIZE = 64
"""Pixels of the black start images of pipelines that need some."""


def prompt_texts(pipe: Any, prompts: Sequence[str], sampling: Sampling) -> list[Text]:
    """Return the text arguments of the denoiser for each prompt, one row each (`sites.TEXT_ARGUMENTS`).

    They are read from one step without guidance, which every pipeline that `generate` draws with can take.

    Args:
        pipe: The diffusers pipeline.
        prompts: The prompts.
        sampling: Size of the images that are drawn for it.
    """
    found: list[DenoiserCall] = []
    taken = inspect.signature(type(pipe).__call__).parameters
    shape, start, mask = (len(prompts), _START_SIZE, _START_SIZE), None, None
    if {"image", "strength"} <= taken.keys():
        start = np.zeros((*shape, 3), np.uint8)
    if "mask_image" in taken:
        mask = np.ones(shape, dtype=bool)
    one = replace(sampling, num_inference_steps=1, guidance_scale=1.0, batch_size=len(prompts), strength=1.0)
    with denoiser_calls(pipe, found.append):
        generate(pipe, prompts, [0] * len(prompts), one, image=start, mask_image=mask)
    return [
        {name: x.detach().clone() for name, x in text_of(found[0].conditioning, row).items()}
        for row in range(len(prompts))
    ]
