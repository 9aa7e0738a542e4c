"""Activations whose true features are known."""

from __future__ import annotations

import torch
from torch import Tensor


def planted(
    n: int, d: int, vectors: int, active: float, seed: int, noise: float = 0.05, strong: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(true directions [n, d], activations [vectors, d]): sparse sums of unit directions plus an offset.

    Directions fire alone, `active` of them a vector on average, at rates that fall by Zipf's law, with
    coefficients in [1, 1.5]. `noise` is its norm; `strong` adds dense Gaussian coordinates of that size in
    four directions, which random features all align with, so that many die.
    """
    # Far from the seeds of trainings, which would otherwise start from the very directions planted here.
    g = torch.Generator().manual_seed(987_654 + seed)
    directions = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    rates = 1 / torch.arange(1, n + 1) ** 0.7
    fires = torch.rand(vectors, n, generator=g) < rates / rates.sum() * active
    z = fires * (1 + 0.5 * torch.rand(vectors, n, generator=g))
    x = z @ directions + noise * torch.randn(vectors, d, generator=g) / d**0.5 + torch.randn(d, generator=g)
    axes = torch.linalg.qr(torch.randn(d, 4, generator=g)).Q
    return directions, x + strong * torch.randn(vectors, 4, generator=g) @ axes.T


def recovered(directions: Tensor, found: Tensor, cosine: float = 0.9) -> float:
    """Share of the true directions [n, d] that a row of `found` [m, d] matches."""
    return float(((directions @ found.T).amax(1) > cosine).float().mean())
