"""The gate: which features detect the concept, and from which evidence on they may act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.eraser import Gate
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import ConceptError
from neuraleraser.fitting.trajectories import SHARES
from neuraleraser.sae import SAE
from neuraleraser.settings import FitSettings
from neuraleraser.sites import Site

MAX_GATE_FEATURES = 64
"""Features that a gate reads together, at most."""
MIN_FIRING_RATE = 0.005
"""A feature that fires on a smaller share of rows is no candidate."""
SINGLE_FEATURE_SEPARATION = 0.95
"""Share of rows that one feature must separate by itself to be a gate."""
FALSE_OPENINGS = FitSettings.false_openings
BUDGETS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of false openings that the trade-off is reported for."""
MIN_ROWS_FOR_QUANTILE = 200
"""Rows without the concept that show the 99.5th percentile of their evidence."""


@dataclass(frozen=True)
class Detector:
    """Features that together detect the concept.

    Attributes:
        features: Their numbers in the SAE, [f].
        weight: Their weights, [f]: above 0 a feature speaks for the concept, below 0 against it (neighbours have it).
        share: Index in `SHARES` of the pooling.
        separation: Share of rows with the concept above the 99.5th percentile of rows without, [T].
    """

    features: Tensor
    weight: Tensor
    share: int
    separation: Tensor


def choose_features(shows: Tensor, lacks: Tensor, count: int = MAX_GATE_FEATURES) -> Detector:
    """Return the feature that detects the concept by itself, where there is one; else the `count` that do so together.

    shows [N, T, shares, n] from prompts with the concept, lacks [M, T, shares, n] without it. One feature is enough
    where it separates `SINGLE_FEATURE_SEPARATION` of the rows. Else those that a logistic regression leans on most
    (weight times spread) are kept, and weighed by it. Of both ways of pooling the one that separates better is taken,
    the mean if equal.

    Raises ConceptError if no feature fires more with the concept than without.
    """
    pooled: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for share in range(len(SHARES)):
        on, off = shows[:, :, share].float(), lacks[:, :, share].float()
        often = (torch.cat([on, off]) > 0).float().mean((0, 1)) > MIN_FIRING_RATE
        candidates = often.nonzero()[:, 0]
        if bool((on.mean((0, 1)) > off.mean((0, 1)))[candidates].any()):
            pooled.append((on, off, candidates, share))
    alone = [_best_single(*p) for p in pooled]
    if alone := [d for d in alone if float(d.separation.mean()) >= SINGLE_FEATURE_SEPARATION]:
        return max(alone, key=lambda d: float(d.separation.mean()))
    together = [d for d in (_best_combination(*p, count) for p in pooled) if bool((d.weight > 0).any())]
    if not together:
        raise ConceptError("no feature fires more with the concept than without: give other prompts, or another site")
    return max(together, key=lambda d: float(d.separation.mean()))


def _separation(on: Tensor, off: Tensor) -> Tensor:
    """Return the share of rows on [N, T, ...] above the 99.5th percentile of off [M, T, ...]: [T, ...]."""
    return (on > off.quantile(0.995, 0)).float().mean(0)


def _best_single(on: Tensor, off: Tensor, candidates: Tensor, share: int) -> Detector:
    """Return the candidate that separates best by itself."""
    separation = _separation(on[..., candidates], off[..., candidates])  # [T, candidates]
    best = separation.mean(0).argmax()
    return Detector(candidates[best][None], torch.ones(1), share, separation[:, best])


def _best_combination(on: Tensor, off: Tensor, candidates: Tensor, share: int, count: int) -> Detector:
    """Return the `count` best of the candidates together, weighed by logistic regression."""
    weight = logistic_weights(on[..., candidates], off[..., candidates])
    leaning = weight.abs() * (on.std((0, 1)) + off.std((0, 1)))[candidates]
    features = candidates[leaning.topk(min(count, len(candidates))).indices]
    weight = logistic_weights(on[..., features], off[..., features])
    separation = _separation(on[..., features] @ weight, off[..., features] @ weight)
    return Detector(features, weight, share, separation)


def logistic_weights(on: Tensor, off: Tensor, penalty: float = 1e-2) -> Tensor:
    """Return the weights [f] of a logistic regression of on [N, T, f] against off [M, T, f], with an intercept for each
    timestep, both classes weighing the same, `penalty` times the squared weights (of features in units of their
    spread). By L-BFGS; deterministic."""
    spread = on.std((0, 1)) + off.std((0, 1)) + 1e-4
    a, b = on / spread, off / spread
    weight = torch.zeros(a.shape[-1], requires_grad=True)
    intercept = torch.zeros(a.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, intercept], max_iter=60, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        apart = F.softplus(-(a @ weight + intercept)).mean() + F.softplus(b @ weight + intercept).mean()
        whole = apart + penalty * weight.square().sum()
        whole.backward()
        return whole

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[arg-type]  # its stubs want a float, its code a tensor
    return weight.detach() / spread


def gate_bounds(shows: Tensor, lacks: Tensor, false_openings: float = FALSE_OPENINGS) -> tuple[Tensor, Tensor]:
    """Return low and high [T], between which the gate opens, from evidence with the concept [N, T] and without [M, T].

    low is what the share `false_openings` of those without the concept exceeds, or a fifth of the first decile with it
    if that is larger (a concept that shares its image with another can be that weak). With fewer than
    `MIN_ROWS_FOR_QUANTILE` rows without, it is their maximum, or half of that decile. high lies 0.15 of the way from
    low to the median with the concept.
    Where that median lies below low the gate stays shut: it could not tell.
    """
    typical, weak = shows.median(0).values, shows.quantile(0.1, 0)
    least = 0.2 if len(lacks) >= MIN_ROWS_FOR_QUANTILE else 0.5
    low = torch.maximum(lacks.quantile(1 - false_openings, 0, interpolation="higher"), least * weak).clamp(min=1e-6)
    high = low + 0.15 * (typical - low).clamp(min=1e-3)
    shut = typical <= low
    return torch.where(shut, SHUT_BOUND, low), torch.where(shut, 2 * SHUT_BOUND, high)


def trade_off(shows: Tensor, lacks: Tensor) -> tuple[tuple[float, float, float], ...]:
    """Return what a gate would give for each of `BUDGETS`: (false_openings, share of the rows with the concept
    [N, T] on which it opens at some timestep, share of those without [M, T])."""
    found = []
    for budget in BUDGETS:
        low, _ = gate_bounds(shows, lacks, budget)
        found.append((budget, *(round(float((x > low).any(1).float().mean()), 4) for x in (shows, lacks))))
    return tuple(found)


def build_gate(sae: SAE, site: Site, detector: Detector, times: Tensor, low: Tensor, high: Tensor) -> Gate:
    """Return the gate, with copies of the SAE's rows; the decoder bias is folded into the features' biases."""
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
