"""Many erasers at one site as a few tensors, so that what they cost hardly grows with their number.

The arithmetic is that of `Gate` and `Correction`, which say what is meant; here it is made once for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuraleraser.eraser.parts import Correction, Gate
from neuraleraser.sites import Site


def told(rows: Tensor, *columns: Tensor) -> list[bytes]:
    """What tells one feature from another: the bytes of its row [f, d] and of its entry in each of columns [f]."""
    every = torch.cat([rows, *(c.unsqueeze(1) for c in columns)], 1)
    return [row.tobytes() for row in every.detach().cpu().double().numpy()]


def numbered(known: dict[bytes, int], told: Sequence[bytes]) -> list[int]:
    """A number for each feature; equal features have equal numbers."""
    return [known.setdefault(feature, len(known)) for feature in told]


def _alike(keys: Sequence[Tensor]) -> list[list[int]]:
    """Which of some tensors are equal: lists of their indices."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(tuple(key.tolist()), []).append(i)
    return list(groups.values())


def bins(middles: Tensor, timestep: Tensor) -> Tensor:
    """Index of the time bin [B] of each timestep [B]."""
    return torch.bucketize(timestep, middles)


def _middles(times: Tensor) -> Tensor:
    return (times[1:] + times[:-1]) / 2


class Gates:
    """The gates of several erasers at one site: one encoder product over their distinct features, one product for
    all their evidence. `order`: which gate has which column of what is returned."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        known: dict[bytes, int] = {}
        mine = [numbered(known, told(g.rows, g.bias, g.threshold)) for g in gates]
        first: dict[int, tuple[int, int]] = {}
        for i, features in enumerate(mine):
            for k, feature in enumerate(features):
                first.setdefault(feature, (i, k))
        where = [first[feature] for feature in range(len(known))]
        self.rows, self.bias, self.threshold = (
            torch.stack([getattr(gates[i], name)[k] for i, k in where]) for name in ("rows", "bias", "threshold")
        )
        self.times = _alike([g.times for g in gates])
        self.order = [i for group in self.times for i in group]
        weight = self.rows.new_zeros(len(known), len(gates))
        for column, i in enumerate(self.order):
            weight[:, column].index_add_(0, torch.tensor(mine[i], device=weight.device), gates[i].weight)
        self.weight = weight
        # Pooling goes by share: columns of features, and their weights for all gates.
        self.pools: list[tuple[float, Tensor | None, Tensor]] = []
        for share in dict.fromkeys(g.share for g in gates):
            of = [column for column, i in enumerate(self.order) if gates[i].share == share]
            used = sorted({feature for column in of for feature in mine[self.order[column]]})
            index = torch.tensor(used, device=weight.device)
            own = torch.zeros_like(weight)
            own[:, of] = weight[:, of]
            everything = len(used) == len(known)
            self.pools.append((share, None if everything else index, own if everything else own[index]))
        self.bounds = [
            (
                _middles(gates[group[0]].times),
                torch.stack(
                    [torch.stack([g.low, g.high - g.low], 1) for g in (gates[i] for i in group)], 2
                ),  # low, and high above it: [T, 2, E]
            )
            for group in self.times
        ]

    def __call__(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, P, d], timestep [B] or [1] -> opening [B, E], evidence [B, E], features z [B, P, f].

        Where x has NaN or infinity, evidence has.
        """
        # In float32 at least: half precision would round neighbouring thresholds and bounds into one.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pre = torch.nn.functional.linear(x, self.rows.to(x), self.bias.to(x))
        z = pre * (pre > self.threshold.to(pre))  # a product, so that NaN is not taken for "does not fire"
        evidence: Tensor | None = None
        for share, index, weight in self.pools:
            used = z if index is None else z.index_select(2, index)
            if share < 1:
                used = used.topk(max(1, round(used.shape[1] * share)), 1).values
            part = used.mean(1) @ weight.to(z)
            evidence = part if evidence is None else evidence + part
        assert evidence is not None
        found = [bounds.index_select(0, bins(middles, timestep)) for middles, bounds in self.bounds]
        low, width = (found[0] if len(found) == 1 else torch.cat(found, 2)).to(evidence).unbind(1)
        return ((evidence - low) / width).clamp(0, 1), evidence, z

    def where(self, z: Tensor) -> Tensor:
        """z [B, P, f] -> evidence by position [B, P, E]."""
        return z @ self.weight.to(z)


class Learnt:
    """Learnt corrections of several erasers at one site, of equal time bins, as one of the sum of their ranks.

    Each has one column more than its rank: x times `down` gives 1 there, and its row of `up` is the bias. So two
    products make the whole change, and what the erasers' amounts are multiplied with is small.
    """

    def __init__(self, corrections: Sequence[Correction]) -> None:
        t = [c.tensors for c in corrections]
        self.middles = _middles(corrections[0].times)
        self.down = torch.cat([torch.nn.functional.pad(v["down"], (0, 1)) for v in t], 2)  # [T, d, r]
        self.up = torch.cat([torch.cat([v["up"], v["bias_out"].unsqueeze(1)], 1) for v in t], 1)  # [T, r, d]
        ranks = torch.tensor([v["down"].shape[2] + 1 for v in t])
        self.one = torch.zeros(self.down.shape[2]).index_fill_(0, ranks.cumsum(0) - 1, 1.0).to(self.down)  # [r]
        self.owner = torch.arange(len(t)).repeat_interleave(ranks).to(self.down.device)
        self.cast: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, timestep: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, P, d], timestep [B] or [1], amounts [B, E] -> sum of amount times delta [B, P, d], 0 where all
        amounts are; and x's projections, which the sum is made of."""
        down, up, one = self._in(x.dtype)
        if len(down) > 1:
            index = bins(self.middles, timestep)
            down, up = down.index_select(0, index), up.index_select(0, index)
        amounts = amounts.to(x.dtype)
        each = amounts if amounts.shape[1] == 1 else amounts.index_select(1, self.owner)
        if len(down) == 1:
            low = torch.addmm(one, x.reshape(-1, x.shape[2]), down[0]).view(*x.shape[:2], -1)
        else:
            low = torch.baddbmm(one, x, down)
        return torch.bmm(low, up * each.unsqueeze(2)), low

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The tables in the model's dtype, made once."""
        own = self.down, self.up, self.one
        if dtype == self.down.dtype:
            return own
        if torch.compiler.is_compiling():
            return self.down.to(dtype), self.up.to(dtype), self.one.to(dtype)
        if dtype not in self.cast:
            self.cast[dtype] = self.down.to(dtype), self.up.to(dtype), self.one.to(dtype)
        return self.cast[dtype]


def learnt(corrections: Sequence[tuple[int, Correction]]) -> list[tuple[list[int], Learnt, tuple[Site, ...]]]:
    """Learnt corrections with their erasers' numbers -> those of equal time bins and further sites together, and these
    sites."""
    made = []
    for also in dict.fromkeys(c.also for _, c in corrections):
        some = [(i, c) for i, c in corrections if c.also == also]
        for group in _alike([c.times for _, c in some]):
            made.append(([some[k][0] for k in group], Learnt([some[k][1] for k in group]), also))
    return made
