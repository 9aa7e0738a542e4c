"""What an eraser is made of: the gate and the corrections, as arithmetic on activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.sites import Site

MODES = ("scale", "replace", "learnt")


def nearest(times: Tensor, timestep: Tensor) -> Tensor:
    """Index of the nearest entry of ascending `times` [T] for each timestep [B] -> int64 [B], on the device."""
    middles = (times[1:] + times[:-1]) / 2
    return torch.bucketize(timestep.contiguous(), middles.to(timestep.device))


def fire(x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """x [B, P, d] -> z [B, P, f]: pre = x . row + bias where it exceeds the threshold, else 0.

    In float32 at least: half precision would round neighbouring thresholds and bounds into one.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pre = torch.nn.functional.linear(x, rows.to(x), bias.to(x))
    return torch.where(pre > threshold.to(pre), pre, torch.zeros_like(pre))


@dataclass(frozen=True)
class Gate:
    """When an eraser acts: selected features at one site, their pooled evidence, and its bounds by timestep.

    evidence = sum_i weight_i * (mean of z_i over its strongest `share` of positions), with
    z_i = pre_i where pre_i = row_i . x + bias_i exceeds threshold_i, else 0;
    gate = clamp((evidence - low_t) / (high_t - low_t), 0, 1): exactly 0 up to low_t, so 0 where no feature that
    speaks for the concept (weight above 0) fires.

    features int64 [f]: the features' numbers in their SAE; rows [f, d], bias [f], threshold [f] (>= 0),
    weight [f]; times [T] ascending, low and high [T], 0 <= low < high.
    """

    site: Site
    features: Tensor
    rows: Tensor
    bias: Tensor
    threshold: Tensor
    weight: Tensor
    share: float
    times: Tensor
    low: Tensor
    high: Tensor

    def fires(self, x: Tensor) -> Tensor:
        """Activation of each selected feature: x [B, P, d] -> z [B, P, f], float32 at least."""
        return fire(x, self.rows, self.bias, self.threshold)

    def evidence(self, x: Tensor) -> Tensor:
        """x [B, P, d] -> pooled evidence [B], float32 at least."""
        z = self.fires(x)
        if self.share < 1:
            z = z.topk(max(1, round(z.shape[1] * self.share)), 1).values
        return z.mean(1) @ self.weight.to(z)

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        """How far the gate is open for each row: x [B, P, d], timestep [B] -> [B] in 0..1."""
        evidence, index = self.evidence(x), nearest(self.times, timestep)
        low, high = (v.to(evidence).index_select(0, index) for v in (self.low, self.high))
        return ((evidence - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class Correction:
    """What an eraser changes at one site. Tensors by mode, T' time bins `times` [T'] ascending:

    scale    delta = sum_i (factor_ti - 1) z_i d_i: rows [f, d], bias, threshold [f], decoder [f, d],
             factor [T', f].
    replace  delta = (c_t - x) Q Q^T at positions where a selected feature fires: rows, bias, threshold,
             basis Q [d, q] (orthonormal, spans the selected decoder rows), centre [T', d].
    learnt   delta = x V_t U_t + b_t: down V [T', d, r], up U [T', r, d], bias_out b [T', d].

    x is what stands at `site`; a learnt delta is added there and at all sites of `also`, which come later and hold the
    same x: blocks that read the same prompt.
    """

    site: Site
    mode: str
    times: Tensor
    tensors: Mapping[str, Tensor]
    also: tuple[Site, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it changes."""
        return self.site, *self.also

    @property
    def width(self) -> int:
        """d, the width of the site's activations."""
        return self.tensors["down" if self.mode == "learnt" else "rows"].shape[1]

    def change(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Mode scale: what is added to each selected feature, (factor_ti - 1) z_i -> [B, P, f]."""
        t = self.tensors
        z = fire(x, t["rows"], t["bias"], t["threshold"])
        factor = t["factor"].to(z).index_select(0, nearest(self.times, timestep))
        return z * (factor - 1).unsqueeze(1)

    def delta(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, P, d], timestep [B] -> delta [B, P, d]; reads no other row and copies no other position."""
        t = self.tensors
        if self.mode == "scale":
            z = self.change(x, timestep)
            return z @ t["decoder"].to(z)
        index = nearest(self.times, timestep)
        if self.mode == "learnt":
            down, up, bias = (t[k].to(x).index_select(0, index) for k in ("down", "up", "bias_out"))
            return torch.baddbmm(bias.unsqueeze(1), torch.bmm(x, down), up)
        z = fire(x, t["rows"], t["bias"], t["threshold"])
        basis = t["basis"].to(z)
        gap = (t["centre"].to(z).index_select(0, index).unsqueeze(1) - x) @ basis @ basis.T
        return torch.where((z > 0).any(-1, keepdim=True), gap, torch.zeros_like(gap))
