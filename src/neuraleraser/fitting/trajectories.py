"""The states that an eraser is fitted on: recorded denoiser calls, and the features seen along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.sae import SAE
from neuraleraser.sampling import Images
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Site, denoiser_calls

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


def record_trajectories(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    sae: SAE,
    site: Site,
    image: Images | None = None,
) -> tuple[list[DenoiserCall], Pooled]:
    """Draw the images -> the conditional half of every denoiser call, all images in a row, and the pooled features
    at `site`."""
    calls, values, times = record_calls(pipe, prompts, seeds, sampling, site, feature_pools(sae), image)
    return calls, Pooled(values, times)


def record_calls(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    site: Site,
    measure: Callable[[Tensor], Tensor],
    image: Images | None = None,
) -> tuple[list[DenoiserCall], Tensor, Tensor]:
    """Draw the images; keep the conditional half of every denoiser call, all images in a row -> calls, and values
    and times as `measure_site` gives them."""
    batches: list[list[DenoiserCall]] = []
    real = 0

    def begin(first: int, count: int) -> None:
        nonlocal real
        batches.append([])
        real = count

    def on(call: DenoiserCall) -> None:
        assert call.layout is not None
        index = call.layout.first_conditional()
        if index is not None:  # None: a pass over the negative prompt
            batches[-1].append(call.rows(torch.tensor(index[:real], device=call.state.device)))

    with denoiser_calls(pipe, on):
        values, times, _ = measure_site(pipe, site, measure, prompts, seeds, sampling, image, begin)
    return [join_calls(parts) for parts in zip(*batches, strict=True)], values, times


def join_calls(calls: Sequence[DenoiserCall]) -> DenoiserCall:
    """Calls of one step, of several batches, as one."""

    def cat(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {k: cat([v[k] for v in values]) for k in values[0]}
        return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].ndim else values[0]

    return DenoiserCall(
        cat([c.state for c in calls]),
        calls[0].timestep.flatten()[:1],
        cat([dict(c.conditioning) for c in calls]),
        cat([c.prediction for c in calls]),
    )
