"""Mean activations by site and timestep: what methods share that take differences of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site


def sum_of_means(
    pipe: Any, sites: Sequence[Site], prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> dict[Site, dict[float, Tensor]]:
    """Draw images; return the sum over images of the mean over positions [d] of the conditional half, by site and
    timestep."""
    sums: dict[Site, dict[float, Tensor]] = {site: {} for site in sites}

    def on_activations(batch: ActivationBatch) -> None:
        if batch.branch == CONDITIONAL:
            mean = batch.x[: len(batch.images)].float().mean(1).sum(0).cpu()
            seen = sums[batch.site]
            seen[batch.timestep] = seen.get(batch.timestep, torch.zeros_like(mean)) + mean

    collect(pipe, prompts, seeds, sites, on_activations, sampling)
    return sums
