"""Low-rank corrections, fitted so that the denoiser predicts what it would without the concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neuraleraser.eraser.corrections.correction import BatchedCorrection, group_equal
from neuraleraser.eraser.gate import bin_edges, time_bin
from neuraleraser.sites import Site


@dataclass(frozen=True)
class LowRank:
    """delta = x V_t U_t + b_t, with T time bins `times` [T] ascending: down V [T, d, r], up U [T, r, d], bias b [T, d].

    The same at every site of `also`.
    """

    site: Site
    times: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    also: tuple[Site, ...] = ()

    KIND: ClassVar[str] = "low_rank"
    AXES: ClassVar[Mapping[str, str]] = {"times": "t", "down": "tdr", "up": "trd", "bias": "td"}

    @property
    def width(self) -> int:
        """Width d of the site's activations."""
        return self.down.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `from_tensors` takes."""
        return {name: getattr(self, name) for name in self.AXES}

    @classmethod
    def from_tensors(cls, site: Site, tensors: Mapping[str, Tensor], also: tuple[Site, ...] = ()) -> LowRank:
        """Return the correction made of tensors whose axes are `AXES`."""
        return cls(site, **tensors, also=also)

    def validation_error(self) -> str | None:
        """Return None: any finite values can be used."""
        return None

    def delta(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, P, d], timestep [B] -> delta [B, P, d]."""
        index = time_bin(self.times, timestep)
        down, up, bias = (v.to(x).index_select(0, index) for v in (self.down, self.up, self.bias))
        return torch.baddbmm(bias.unsqueeze(1), torch.bmm(x, down), up)

    @classmethod
    def batched(cls, corrections: Sequence[LowRank], separate: bool) -> list[tuple[list[int], BatchedCorrection]]:
        """Return corrections of equal time bins as one of the sum of their ranks; where `separate`, each by itself.

        Never by the gates that happen to be open together: an image's bits would depend on its neighbours.
        """
        if separate:
            groups = [[i] for i in range(len(corrections))]
        else:
            groups = group_equal([c.times for c in corrections])
        return [(group, BatchedLowRank([corrections[i] for i in group])) for group in groups]


class BatchedLowRank:
    """Low-rank corrections of several erasers at one site, of equal time bins, as one of the sum of their ranks.

    The bias is folded in as one more rank whose projection is 1, so that a change is two matrix products.
    """

    def __init__(self, corrections: Sequence[LowRank]) -> None:
        self.edges = bin_edges(corrections[0].times)
        self.down = torch.cat([torch.nn.functional.pad(c.down, (0, 1)) for c in corrections], 2)  # [T, d, r]
        self.up = torch.cat([torch.cat([c.up, c.bias.unsqueeze(1)], 1) for c in corrections], 1)  # [T, r, d]
        ranks = torch.tensor([c.down.shape[2] + 1 for c in corrections])
        ones = torch.zeros(self.down.shape[2]).index_fill_(0, ranks.cumsum(0) - 1, 1.0)
        self.bias_column = ones.to(self.down)  # [r]
        self.eraser_of_column = torch.arange(len(corrections)).repeat_interleave(ranks).to(self.down.device)
        self.cast: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, timestep: Tensor, scales: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """x [B, P, d], timestep [B] or [1], scales [B, E] -> delta [B, P, d]; and x's projections."""
        down, up, one = self._in(x.dtype)
        if len(down) > 1:
            index = torch.bucketize(timestep, self.edges)
            down, up = down.index_select(0, index), up.index_select(0, index)
        scales = scales.to(x.dtype)
        each = scales if scales.shape[1] == 1 else scales.index_select(1, self.eraser_of_column)
        if len(down) == 1:
            projected = torch.addmm(one, x.reshape(-1, x.shape[2]), down[0]).view(*x.shape[:2], -1)
        else:
            projected = torch.baddbmm(one, x, down)
        # A value of x that is not finite makes its projection so; only in float16 can a change overflow by itself.
        return torch.bmm(projected, up * each.unsqueeze(2)), None if x.dtype == torch.float16 else projected

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables in the model's dtype, made once."""
        own = self.down, self.up, self.bias_column
        if dtype == self.down.dtype:
            return own
        if torch.compiler.is_compiling():
            return self.down.to(dtype), self.up.to(dtype), self.bias_column.to(dtype)
        if dtype not in self.cast:
            self.cast[dtype] = self.down.to(dtype), self.up.to(dtype), self.bias_column.to(dtype)
        return self.cast[dtype]
