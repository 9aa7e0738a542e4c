"""The gate: which features detect the concept, and from which evidence on they may act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.concepts import neighbour_score, profile
from neuraleraser.eraser import Gate
from neuraleraser.errors import ConceptError
from neuraleraser.fit.states import SHARES
from neuraleraser.sae import SAE
from neuraleraser.sites import Site

FEATURES = 16
SHUT = 1e9
"""A bound that no evidence reaches: the gate stays shut at timesteps where it could not tell."""


@dataclass(frozen=True)
class Detector:
    """Features, their weights, and how well they tell: `separation` [T] is the share of positive rows above all
    negatives' 99.5th percentile."""

    features: Tensor
    weight: Tensor
    share: int
    separation: Tensor


def choose(shows: Tensor, lacks: Tensor, labels: list[str], count: int = FEATURES) -> Detector:
    """Choose features: shows [N, T, shares, n] on prompts with the concept, lacks [M, T, shares, n] without it,
    `labels` [M] naming what each of those shows instead (its style or its object).

    For each way of pooling, the `count` features with the largest gap to their worst neighbouring concept,
    weighted by that gap over their spread; the pooling that separates better is kept.
    """
    best: Detector | None = None
    for share in range(len(SHARES)):
        on, off = shows[:, :, share].float(), lacks[:, :, share].float()
        stats = profile(torch.cat([on, off]), torch.arange(on.shape[1]), [*["?shows"] * len(on), *labels])
        score = neighbour_score(stats, "?shows").mean(0)  # over timesteps
        features = score.topk(count).indices
        scale = on[..., features].std((0, 1)) + off[..., features].std((0, 1)) + 1e-6
        weight = score[features].clamp(min=0) / scale
        a, b = on[..., features] @ weight, off[..., features] @ weight
        separation = (a > b.quantile(0.995, 0)).float().mean(0)
        if best is None or separation.mean() > best.separation.mean():
            best = Detector(features, weight, share, separation)
    assert best is not None
    if best.weight.sum() == 0:
        raise ConceptError("no feature tells the concept from its neighbours: give more prompts, or another site")
    return best


def bounds(shows: Tensor, lacks: Tensor) -> tuple[Tensor, Tensor]:
    """low and high [T] from evidence on rows with the concept [N, T] and without [M, T].

    low lies above every row without the concept, by a tenth of the gap to the rows with it; where the two
    overlap, at the 99.5th percentile; where most rows with the concept lie below that, the gate is shut.
    """
    top, high_quantile = lacks.amax(0), lacks.quantile(0.995, 0)
    typical, weak = shows.median(0).values, shows.quantile(0.05, 0)
    low = torch.where(
        weak > top, top + 0.3 * (weak - top), torch.maximum(high_quantile, torch.minimum(top, 0.9 * typical))
    )
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
