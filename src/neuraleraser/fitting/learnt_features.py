"""Features learnt for one concept: windows of an image-stream site that tell its pictures from others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.eraser.gate import pre_activations
from neuraleraser.fitting.noised_pictures import NoisedStates
from neuraleraser.precision import fast_dtype

COUNT = 64
"""Features that are learnt."""
EPOCHS = 12
"""Passes over the states, at most."""
WINDOW = 3
"""Positions a side that each reads: one alone holds too little of an object (docs/LOG.md)."""


@dataclass(frozen=True)
class LearntFeatures:
    """Features that together tell a concept's pictures: rows [f, d window^2], bias [f], weight [f]; see `Gate`."""

    rows: Tensor
    bias: Tensor
    weight: Tensor
    share: float
    window: int


@torch.no_grad()
def evidence_of(features: LearntFeatures, states: NoisedStates) -> Tensor:
    """Return the evidence [N, K] in each state, as a gate of these features has it."""
    found = []
    for x in states.values.flatten(0, 1).split(100):
        pre = pre_activations(x, features.rows, features.bias, features.window, states.grid)
        found.append(_pool(pre, features.share) @ features.weight)
    return torch.cat(found).view(states.values.shape[:2])


def most_mistaken(features: LearntFeatures, lacks: NoisedStates, count: int) -> NoisedStates:
    """Return the states of the `count` pictures without the concept that these features take for it most."""
    return lacks.rows(evidence_of(features, lacks).amax(1).topk(count).indices)


def learn_features(
    shows: NoisedStates,
    lacks: NoisedStates,
    share: float,
    *,
    count: int = COUNT,
    steps: int = 600,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[float], None] | None = None,
) -> LearntFeatures:
    """Learn features from states that show the concept and states that lack it, noised to some of the same T levels.

    One hidden layer: evidence = weight . pooled relu(rows . x's window + bias), with an intercept for each of the T
    levels of noise; cross-entropy, both classes weighing the same. share: of positions that a feature is pooled over,
    its strongest. Each reads a window of `WINDOW` positions a side, or its own alone where these form no known grid.
    """
    window = 1 if shows.grid is None else WINDOW
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([states.values.flatten(0, 1) for states in (shows, lacks)])
    y = (torch.arange(len(x)) < shows.levels.numel()).float()
    level = torch.cat([states.levels.flatten() for states in (shows, lacks)])
    sample = x[torch.randperm(len(x), generator=generator)[:200]].float()
    mean, spread = sample.mean((0, 1)), sample.std((0, 1)) + 1e-4
    d = x.shape[2]
    kernels = torch.randn(count, d, window**2, generator=generator) / (d * window**2) ** 0.5
    hidden, offset = kernels.requires_grad_(), torch.zeros(count, requires_grad=True)
    weight = torch.zeros(count, requires_grad=True)
    intercept = torch.zeros(len(shows.times), requires_grad=True)
    adam = torch.optim.AdamW([hidden, offset, weight, intercept], lr=lr, weight_decay=3e-2)
    balance = torch.where(y > 0, (y == 0).sum() / (y > 0).sum(), 1.0)

    def layer() -> tuple[Tensor, Tensor]:
        """Return rows and bias for x as it is, of weights for x in units of its spread."""
        scaled = hidden / spread[:, None]
        return scaled.flatten(1), offset - (scaled * mean[:, None]).sum((1, 2))

    batch = min(batch, len(x))
    steps = min(steps, EPOCHS * (len(x) // batch))
    with torch.enable_grad():
        for step in range(steps):
            if step % (len(x) // batch) == 0:
                order = torch.randperm(len(x), generator=generator)
            at = order[(step % (len(x) // batch)) * batch :][:batch]
            pre = _responses(x[at], hidden, offset, mean, spread, shows.grid)
            logit = _pool(pre, share) @ weight + intercept[level[at]]
            loss = F.binary_cross_entropy_with_logits(logit, y[at], weight=balance[at])
            adam.zero_grad(set_to_none=True)
            loss.backward()
            for group in adam.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50, 1.2 * (1 - step / steps) + 1e-3)
            adam.step()
            if on_step:
                on_step((step + 1) / steps)
    rows, bias = layer()
    return LearntFeatures(rows.detach(), bias.detach(), weight.detach(), share, window)


def _responses(
    x: Tensor, kernels: Tensor, bias: Tensor, mean: Tensor, spread: Tensor, grid: tuple[int, int] | None
) -> Tensor:
    """Return what features make of x [B, P, d], [B, P, f] in float32: `kernels` [f, d, window^2] of x in units of its
    spread [d] around its mean [d].

    Products are in the fast number format: twice as fast, and what is learnt is read in float32 (`evidence_of`).
    """
    dtype = fast_dtype(x.device)
    if grid is None:
        scaled = ((x.float() - mean) / spread).to(dtype)
        return F.linear(scaled, kernels[..., 0].to(dtype), bias.to(dtype)).float()
    side = round(kernels.shape[2] ** 0.5)  # outside its grid x counts as 0, as in a gate
    framed = F.pad(x.float().transpose(1, 2).unflatten(2, grid), (side // 2,) * 4)
    scaled = ((framed - mean[:, None, None]) / spread[:, None, None]).to(dtype)
    found = F.conv2d(scaled, kernels.unflatten(2, (side, side)).to(dtype), bias.to(dtype))
    return found.flatten(2).transpose(1, 2).float()


def _pool(pre: Tensor, share: float) -> Tensor:
    """Return the mean over the strongest `share` of positions of what exceeds 0: [B, P, f] -> [B, f]."""
    z = pre.relu()
    return z.topk(max(1, round(z.shape[1] * share)), 1).values.mean(1) if share < 1 else z.mean(1)
