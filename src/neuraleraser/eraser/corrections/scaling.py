"""Features multiplied by factors, as SAeUron does (arXiv 2501.18052, equation 6), without the SAE's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neuraleraser.eraser.batched import feature_identities, number_features
from neuraleraser.eraser.corrections.correction import BatchedCorrection
from neuraleraser.eraser.gate import pre_activations, thresholded_activations, time_bin
from neuraleraser.sites import Site


@dataclass(frozen=True)
class Scaling:
    """delta = sum_i (factor_ti - 1) z_i d_i: features multiplied by a factor, 0 to ablate, negative to steer away.

    rows [f, d], bias [f] of the encoder, decoder d [f, d]; T time bins `times` [T] ascending, threshold [T, f] (>= 0)
    that feature i has to exceed to be multiplied, factor [T, f]. Exactly 0 where no feature exceeds its threshold, or
    all that do have factor 1. The SAE's reconstruction is not computed, so its error never enters.
    """

    site: Site
    times: Tensor
    rows: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    factor: Tensor
    also: tuple[Site, ...] = ()

    KIND: ClassVar[str] = "scaling"
    AXES: ClassVar[Mapping[str, str]] = {
        "times": "t", "rows": "fd", "bias": "f", "threshold": "tf", "decoder": "fd", "factor": "tf",
    }  # fmt: skip

    @property
    def width(self) -> int:
        """Width d of the site's activations."""
        return self.rows.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `from_tensors` takes."""
        return {name: getattr(self, name) for name in self.AXES}

    @classmethod
    def from_tensors(cls, site: Site, tensors: Mapping[str, Tensor], also: tuple[Site, ...] = ()) -> Scaling:
        """Return the correction made of tensors whose axes are `AXES`."""
        return cls(site, **tensors, also=also)

    def validation_error(self) -> str | None:
        """Return a reason why the values cannot be used; None if there is none."""
        if not bool((self.threshold >= 0).all()):
            return "threshold is negative"
        if self.also:
            return f"a correction of kind {self.KIND!r} at several sites, expected one: each has features of its own"
        return None

    def feature_change(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return what is added to each feature, (factor_ti - 1) z_i: x [B, P, d], timestep [B] -> [B, P, f]."""
        index = time_bin(self.times, timestep)
        threshold, factor = (v.index_select(0, index).unsqueeze(1) for v in (self.threshold, self.factor))
        z = thresholded_activations(pre_activations(x, self.rows, self.bias, 1, None), threshold)
        return z * (factor.to(z) - 1)

    def delta(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, P, d], timestep [B] -> delta [B, P, d]."""
        z = self.feature_change(x, timestep)
        return z @ self.decoder.to(z)

    @classmethod
    def batched(cls, corrections: Sequence[Scaling], separate: bool) -> list[tuple[list[int], BatchedCorrection]]:
        """Return all corrections as one group, as they may share features."""
        return [(list(range(len(corrections))), BatchedScaling(corrections))]


class BatchedScaling:
    """Sum of scalings in which a feature that several share is changed once, by the largest change (law 11).

    Features are matched by encoder row and bias (rounded to half precision), because numbers differ between SAEs.
    """

    def __init__(self, corrections: Sequence[Scaling]) -> None:
        self.corrections = list(corrections)
        numbers: dict[bytes, int] = {}
        self.index: list[Tensor] = []
        decoder: dict[int, Tensor] = {}
        for c in corrections:
            own = number_features(numbers, feature_identities(c.rows.half(), c.bias.half()))
            decoder |= {feature: out for feature, out in zip(own, c.decoder, strict=True) if feature not in decoder}
            self.index.append(torch.tensor(own, device=c.rows.device))
        self.decoder = torch.stack([decoder[feature] for feature in range(len(decoder))])

    def __call__(self, x: Tensor, timestep: Tensor, scales: Tensor, /) -> tuple[Tensor, None]:
        """x [B, P, d], timestep [B] or [1], scales [B, E] -> delta [B, P, d]."""
        timestep = timestep.expand(len(x))
        if len(self.corrections) == 1:
            return self.corrections[0].delta(x, timestep) * scales[:, 0].view(-1, 1, 1), None
        changes = []
        for column, (c, features) in enumerate(zip(self.corrections, self.index, strict=True)):
            z = c.feature_change(x, timestep) * scales[:, column].view(-1, 1, 1)
            changes.append(z.new_zeros(*z.shape[:2], len(self.decoder)).index_copy(-1, features.to(z.device), z))
        every = torch.stack(changes)
        largest = every.gather(0, every.abs().argmax(0, keepdim=True))[0]
        return largest @ self.decoder.to(largest), None
