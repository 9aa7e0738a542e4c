"""The states that an eraser is fitted on: recorded denoiser calls, and the features seen along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, Seen, collect
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
    """Pooled features of images at one site: `values` float16 [N, T, branches, shares, n], `times` [T] descending
    as sampled; branch 0 is unconditional where there are two."""

    values: Tensor
    times: Tensor


def pooled_features(
    pipe: Any,
    sae: SAE,
    site: Site,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    init: Images | None = None,
) -> tuple[Pooled, Images]:
    """Draw the images and pool every feature of `sae` at each step."""
    seen: dict[tuple[float, int], list[Tensor]] = {}

    def on(s: Seen) -> None:
        z = sae.encode(s.x.float())
        seen.setdefault((s.timestep, s.branch), []).append(torch.stack([pool(z, q) for q in SHARES], 1).half())

    images = collect(pipe, prompts, seeds, [site], on, sampling, init)
    times = sorted({t for t, _ in seen}, reverse=True)
    branches = sorted({b for _, b in seen})
    values = torch.stack([torch.stack([torch.cat(seen[t, b]) for b in branches], 1) for t in times], 1)
    return Pooled(values, torch.tensor(times)), images


def conditional(values: Pooled) -> Tensor:
    """[N, T, shares, n] of the conditional branch."""
    return values.values[:, :, -1 if values.values.shape[2] > CONDITIONAL else 0]


def recorded(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    sae: SAE,
    site: Site,
    init: Images | None = None,
) -> tuple[list[DenoiserCall], Pooled]:
    """Draw the images; keep the conditional half of every denoiser call, all images in a row, and the pooled
    features at `site`."""
    batches: list[list[DenoiserCall]] = []
    size = sampling.batch if sampling.pad else min(sampling.batch, len(prompts))

    def on(call: DenoiserCall) -> None:
        if not batches or len(batches[-1]) == len_steps[0]:
            batches.append([])
        rows = call.state.shape[0]
        real = min(size, len(prompts) - size * (len(batches) - 1))
        batches[-1].append(call.rows(torch.arange(rows - size, rows - size + real, device=call.state.device)))

    len_steps = [sampling.steps if init is None else min(int(sampling.steps * sampling.strength), sampling.steps)]
    with denoiser_calls(pipe, on):
        pooled, _ = pooled_features(pipe, sae, site, prompts, seeds, sampling, init)
    return [join(parts) for parts in zip(*batches, strict=True)], pooled


def join(calls: Sequence[DenoiserCall]) -> DenoiserCall:
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
