"""The gate: when an eraser acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from neuraleraser.errors import SiteError
from neuraleraser.sites import Site

SHUT_BOUND = 1e9
"""Lower bound of a gate that stays shut at a timestep: no evidence reaches it, so it need not be asked."""
MAX_WINDOW = 7
"""The widest window that a file may ask for: all gates at a site are padded to the widest."""


def time_bin(times: Tensor, timestep: Tensor) -> Tensor:
    """Return the index of the nearest entry of ascending `times` [T] for each timestep [B] -> int64 [B]."""
    return torch.bucketize(timestep.contiguous(), bin_edges(times).to(timestep.device))


def bin_edges(times: Tensor) -> Tensor:
    """Return the edges [T - 1] between bins around ascending `times` [T]."""
    return (times[1:] + times[:-1]) / 2


def thresholded_activations(pre: Tensor, threshold: Tensor) -> Tensor:
    """Return pre-activations [B, P, f] where they exceed the threshold [f], else 0."""
    return torch.where(pre > threshold.to(pre), pre, torch.zeros_like(pre))


def pre_activations(x: Tensor, rows: Tensor, bias: Tensor, window: int, grid: tuple[int, int] | None) -> Tensor:
    """x [B, P, d] -> row . x's window + bias [B, P, f].

    In float32 at least: half precision would round neighbouring thresholds and bounds into one.

    rows [f, d window^2]: each a kernel [d, window, window] over the positions' grid (height, width), outside of which x
    counts as 0. Raises SiteError where a window wider than 1 has no grid of P positions.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if window == 1:
        return torch.nn.functional.linear(x, rows.to(x), bias.to(x))
    if grid is None or grid[0] * grid[1] != x.shape[1]:
        raise SiteError(
            f"a gate reads windows of {window} x {window} positions, and the {x.shape[1]} of its site form no known "
            "grid: use it with the pipeline it was made for"
        )
    kernels = rows.to(x).view(len(rows), -1, window, window)
    pictures = x.transpose(1, 2).unflatten(2, grid)
    return torch.nn.functional.conv2d(pictures, kernels, bias.to(x), padding=window // 2).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Gate:
    """Selected features at one site, their pooled evidence, and its bounds by timestep.

    evidence = sum_i weight_i * (mean of z_i over its strongest `share` of positions), with
    z_i = pre_i where pre_i = row_i . x + bias_i exceeds threshold_i, else 0;
    gate = clamp((evidence - low_t) / (high_t - low_t), 0, 1): exactly 0 up to low_t, so 0 where no feature that
    speaks for the concept (weight above 0) fires.

    features int64 [f]: the features' numbers in their SAE, or counted from 0 where they were learnt for the concept;
    rows [f, d], or [f, d window^2] where a feature reads a `window` of positions around its own (see
    `pre_activations`); bias [f], threshold [f] (>= 0),
    weight [f]; times [T] ascending, low and high [T], 0 <= low < high; low at `SHUT_BOUND` where it cannot tell.

    picture: True for an image gate, which sees the picture however its concept got there: all rows of an image count,
    those of a negative prompt, too. False for a prompt gate, which reads what the image reads of the text.

    text_tokens: length of the prompts that the bounds were set with; a longer text is read in parts of that length, and
    the strongest counts, as each part is then seen as a short prompt is. None: texts of any length are read whole.

    holds: True for a gate whose decision stands as long as the image has the same prompt, so that corrections may act
    before it: in the step in which it opens, which is taken again for that, and in all later ones from their start.
    False: it decides anew at each step, and only what comes after it in the denoiser is corrected.
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
    text_tokens: int | None = None
    picture: bool = False
    window: int = 1
    holds: bool = False

    AXES: ClassVar[Mapping[str, str]] = {
        "features": "f", "rows": "fd", "bias": "f", "threshold": "f", "weight": "f",
        "times": "t", "low": "t", "high": "t",
    }  # fmt: skip
    """Axes of each tensor; equal letters are equal lengths."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the gate's tensors by name."""
        return {name: getattr(self, name) for name in self.AXES}

    def to(self, device: torch.device) -> Gate:
        """Return the gate with its tensors on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def width(self) -> int:
        """Width d of the site's activations."""
        return self.rows.shape[1] // self.window**2

    def is_blind(self, timestep: Tensor) -> Tensor:
        """Return True where the gate is shut whatever there is: timestep [B] -> [B]."""
        index = time_bin(self.times.to(timestep.device), timestep)
        return self.low.to(timestep.device).index_select(0, index) >= SHUT_BOUND

    def activations(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the activation of each selected feature: x [B, P, d] -> z [B, P, f], float32 at least."""
        return thresholded_activations(pre_activations(x, self.rows, self.bias, self.window, grid), self.threshold)

    def evidence(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x [B, P, d] -> pooled evidence [B], float32 at least."""
        z = self.activations(x, grid)
        if self.share < 1:
            z = z.topk(max(1, round(z.shape[1] * self.share)), 1).values
        return z.mean(1) @ self.weight.to(z)

    def __call__(self, x: Tensor, timestep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return how far the gate is open for each row: x [B, P, d], timestep [B] -> [B] in 0..1.

        grid: height and width of the P positions, for a window wider than 1.

        The definition; erasers at work compute it for many gates at once (`batched.BatchedGates`).
        """
        evidence, index = self.evidence(x, grid), time_bin(self.times, timestep)
        low, high = (v.to(evidence).index_select(0, index) for v in (self.low, self.high))
        return ((evidence - low) / (high - low)).clamp(0, 1)
