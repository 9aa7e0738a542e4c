"""The ceiling of a site: the image when the site's activations come from the concept-free prompt.

What no edit at the site can surpass. A measuring instrument, not an eraser: it reads another image's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.concepts import Pair
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, edit


def transplant(
    pipe: Any, pairs: Sequence[Pair], seeds: Sequence[int], sites: Sequence[Site], sampling: Sampling
) -> Images:
    """Draw each `shows` prompt while the conditional activations at `sites` are those of its `without` prompt at
    the same latents -> uint8 [N, H, W, 3]. Needs guidance in one batch."""
    n = len(pairs)

    def swap(x: Tensor, call: EditContext[None]) -> Tensor:
        size = x.shape[0] // 4  # rows: unconditional (shows, without), conditional (shows, without)
        delta = torch.zeros_like(x)
        delta[2 * size : 3 * size] = x[3 * size :] - x[2 * size : 3 * size]
        return delta

    def follow(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = given["latents"].clone()
        half = latents.shape[0] // 2
        latents[half:] = latents[:half]
        return {"latents": latents}

    out = []
    half = sampling.batch_size // 2
    for start in range(0, n, half):
        part = [*range(start, min(start + half, n))]
        part += [part[-1]] * (half - len(part))
        prompts = [pairs[i].positive for i in part] + [pairs[i].negative for i in part]
        both = [seeds[i] for i in part] * 2
        with edit(pipe, dict.fromkeys(sites, swap)):
            images = generate(pipe, prompts, both, sampling, callback_on_step_end=follow)
        out.append(images[: min(half, n - start)])
    return np.concatenate(out)
