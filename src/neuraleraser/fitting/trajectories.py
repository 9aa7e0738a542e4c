"""Calls of the denoiser and pooled features, along the way of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.sae import SAE
from neuraleraser.sampling import Images
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Site, current_batch, denoiser_calls

SHARES = (1.0, 1 / 16)
"""Ways to pool a feature over positions: the mean, for what fills a picture, and the strongest sixteenth, for
what stands somewhere in it."""


def pool(z: Tensor, share: float) -> Tensor:
    """Mean over the strongest `share` of positions of each feature: z [B, P, f] -> [B, f]."""
    if share >= 1:
        return z.mean(1)
    return z.topk(max(1, round(z.shape[1] * share)), 1).values.mean(1)


@dataclass(frozen=True)
class Pooled:
    """Pooled features of images at one site: `values` float16 [N, T, branches, shares, n], `times` [T] as sampled,
    descending (but for schedulers that ask for a timestep twice); branch 0 is unconditional where there are two."""

    values: Tensor
    times: Tensor


def feature_pools(sae: SAE) -> Callable[[Tensor], Tensor]:
    """x [B, P, d] -> every feature, pooled in each way [B, shares, n]."""

    def pools(x: Tensor) -> Tensor:
        z = sae.encode(x.float())
        return torch.stack([pool(z, q) for q in SHARES], 1).half()

    return pools


def pooled_features(
    pipe: Any,
    sae: SAE,
    site: Site,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    image: Images | None = None,
) -> tuple[Pooled, Images]:
    """Draw the images and pool every feature of `sae` at each step."""
    values, times, images = measure_site(pipe, site, feature_pools(sae), prompts, seeds, sampling, image)
    return Pooled(values, times), images


def measure_site(
    pipe: Any,
    site: Site,
    measure: Callable[[Tensor], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    image: Images | None = None,
    on_batch_start: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor, Images]:
    """Draw the images and measure activations x [B, P, d] -> [B, ...] at each pass through the site.

    -> values [N, T, branches, ...], times [T] in the order of sampling, images. A scheduler may ask for the same
    timestep twice (Heun does): T is the number of passes, which is not always that of steps.
    """
    batches: list[list[tuple[float, int, Tensor]]] = []

    def begin(first: int, real: int) -> None:
        batches.append([])
        if on_batch_start:
            on_batch_start(first, real)

    def on(s: ActivationBatch) -> None:
        batches[-1].append((s.timestep, s.branch, measure(s.x)))

    images = collect(pipe, prompts, seeds, [site], on, sampling, image, begin)
    branches = sorted({branch for _, branch, _ in batches[0]})
    times = torch.tensor([t for t, branch, _ in batches[0] if branch == branches[-1]])
    values = [
        torch.stack([torch.stack([v for _, b, v in batch if b == branch], 1) for branch in branches], 2)
        for batch in batches
    ]
    return torch.cat(values), times, images


def branches_as_rows(values: Tensor) -> Tensor:
    """[N, T, branches, ...] -> [N * branches, T, ...]."""
    return values.movedim(2, 1).flatten(0, 1)


def conditional_rows(values: Pooled) -> Tensor:
    """[N, T, shares, n] of the conditional branch."""
    return values.values[:, :, -1 if values.values.shape[2] > CONDITIONAL else 0]


@contextmanager
def calls_by_image(pipe: Any, on_call: Callable[[int, DenoiserCall], None]) -> Iterator[None]:
    """Context manager: calls `on_call(image, call)` with each denoiser call of each image that `generate` draws, as a
    call of the one row that the prompt is asked of."""

    def on(call: DenoiserCall) -> None:
        batch = current_batch()
        assert call.layout is not None and batch is not None
        rows = call.layout.first_conditional() or ()  # none in a pass over the negative prompt
        for image, row in enumerate(rows[: batch.real], batch.first):  # what is beyond is padding
            on_call(image, call.rows(torch.tensor([row], device=call.state.device)))

    with denoiser_calls(pipe, on):
        yield
