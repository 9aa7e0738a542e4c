"""The gate: which features detect the concept, and from which evidence on they may act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.concepts import neighbour_score, profile
from neuraleraser.eraser import Gate
from neuraleraser.errors import ConceptError
from neuraleraser.fit.states import SHARES
from neuraleraser.sae import SAE
from neuraleraser.sites import Site

FEATURES = 16
CANDIDATES = 64
SHUT = 1e9
"""A bound that no evidence reaches: the gate stays shut at timesteps where it could not tell."""


@dataclass(frozen=True)
class Detector:
    """Features [f], their weights [f] >= 0, the index of the pooling in SHARES, and how well they tell:
    `separation` [T] is the share of rows with the concept above the 99.5th percentile of rows without."""

    features: Tensor
    weight: Tensor
    share: int
    separation: Tensor


def choose(shows: Tensor, lacks: Tensor, labels: Sequence[str], count: int = FEATURES) -> Detector:
    """Choose features and weights for both ways of pooling; the one that separates better is kept.

    shows [N, T, shares, n] from prompts with the concept, lacks [M, T, shares, n] without it, `labels` [M] naming
    what each of those shows in its place (its style, or its objects). Candidates are the features with the
    largest gap to their worst neighbouring concept (`concepts.neighbour_score`); the `count` that a logistic
    regression with weights >= 0 leans on most are kept, and weighed by it.

    Raises ConceptError if no feature fires more with the concept than without.
    """
    found: list[Detector] = []
    for share in range(len(SHARES)):
        on, off = shows[:, :, share].float(), lacks[:, :, share].float()
        stats = profile(torch.cat([on, off]), torch.arange(on.shape[1]), [*["?shows"] * len(on), *labels])
        candidates = neighbour_score(stats, "?shows").mean(0).topk(min(CANDIDATES, on.shape[-1])).indices
        candidates = candidates[on[..., candidates].mean((0, 1)) > off[..., candidates].mean((0, 1))]
        if not len(candidates):
            continue
        weight = regress(on[..., candidates], off[..., candidates])
        features = candidates[weight.topk(min(count, len(candidates))).indices]
        weight = regress(on[..., features], off[..., features])
        a, b = on[..., features] @ weight, off[..., features] @ weight
        separation = (a > b.quantile(0.995, 0)).float().mean(0)
        found.append(Detector(features, weight, share, separation))
    if not found:
        raise ConceptError("no feature fires more with the concept than without: give other prompts, or another site")
    return max(found, key=lambda d: float(d.separation.mean()))


def regress(on: Tensor, off: Tensor, steps: int = 150, penalty: float = 1e-2) -> Tensor:
    """Weights [f] >= 0 of a logistic regression of on [N, T, f] against off [M, T, f], with an intercept for each
    timestep, both classes weighing the same, `penalty` times the squared weights (of features in units of their
    spread). Deterministic."""
    spread = on.std((0, 1)) + off.std((0, 1)) + 1e-4
    a, b = on / spread, off / spread
    raw = torch.full((a.shape[-1],), -1.0, requires_grad=True)
    intercept = torch.zeros(a.shape[1], requires_grad=True)
    adam = torch.optim.Adam([raw, intercept], lr=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            weight = F.softplus(raw)
            loss = F.softplus(-(a @ weight + intercept)).mean() + F.softplus(b @ weight + intercept).mean()
            adam.zero_grad(set_to_none=True)
            (loss + penalty * weight.square().sum()).backward()
            adam.step()
    return F.softplus(raw).detach() / spread


def bounds(shows: Tensor, lacks: Tensor) -> tuple[Tensor, Tensor]:
    """low and high [T] from evidence on rows with the concept [N, T] and without [M, T].

    low lies above every row without the concept, a seventh into the gap to the weakest twentieth of the rows with
    it; where the two overlap, at the 99.5th percentile or just under a typical row, whichever is higher but never
    above all rows without. The gate is shut where a typical row with the concept lies below: it could not tell.
    """
    top, most = lacks.amax(0), lacks.quantile(0.995, 0)
    typical, weak = shows.median(0).values, shows.quantile(0.05, 0)
    overlap = torch.maximum(most, torch.minimum(top, 0.9 * typical))
    low = torch.where(weak > top, top + 0.15 * (weak - top), overlap)
    high = low + 0.15 * (typical - low).clamp(min=1e-3)
    shut = typical <= low
    return torch.where(shut, SHUT, low.clamp(min=1e-6)), torch.where(shut, 2 * SHUT, high.clamp(min=2e-6))


def build(sae: SAE, site: Site, detector: Detector, times: Tensor, low: Tensor, high: Tensor) -> Gate:
    """The gate with its own copies of the SAE's rows; the decoder bias is folded into the features' biases."""
    f = detector.features
    rows = sae.W_enc[f].float()
    order = times.argsort()
    return Gate(
        site=site,
        features=f.clone(),
        rows=rows.clone(),
        bias=(sae.b_enc[f].float() - rows @ sae.b_dec.float()),
        threshold=sae.threshold[f].float().clone(),
        weight=detector.weight.clone(),
        share=SHARES[detector.share],
        times=times[order].float().clone(),
        low=low[order].clone(),
        high=high[order].clone(),
    )
