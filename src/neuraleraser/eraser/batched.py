"""The gates of many erasers at one site as a few tensors, so that their cost hardly grows with their number."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from neuraleraser.eraser.gate import Gate, bin_edges, pre_activations, thresholded_activations


def feature_identities(rows: Tensor, *columns: Tensor) -> list[bytes]:
    """Return bytes that identify each feature: its row of rows [f, d] and its entry in each of columns [f]."""
    every = torch.cat([rows, *(c.unsqueeze(1) for c in columns)], 1)
    return [row.tobytes() for row in every.detach().cpu().double().numpy()]


def number_features(known: dict[bytes, int], identities: Sequence[bytes]) -> list[int]:
    """Return a number for each feature, entering new ones in `known`; equal features have equal numbers."""
    return [known.setdefault(feature, len(known)) for feature in identities]


def gate_features(gate: Gate) -> frozenset[bytes]:
    """Return the identities of the features that a gate reads."""
    return frozenset(feature_identities(gate.rows.half(), gate.bias.half(), gate.threshold))


def _in_window(gate: Gate, window: int) -> Tensor:
    """Return a gate's rows for a window that is as wide or wider, 0 around their own."""
    kernels = gate.rows.view(len(gate.rows), -1, gate.window, gate.window)
    return torch.nn.functional.pad(kernels, [(window - gate.window) // 2] * 4).flatten(1)


class BatchedGates:
    """The gates of several erasers at one site: one encoder product over their distinct features, one product for
    all their evidence. `order`: the gate of each column of what is returned.

    The arithmetic is that of `Gate`: opening = clamp((evidence - low) / width, 0, 1).
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        known: dict[bytes, int] = {}
        self.window = max(g.window for g in gates)
        rows_of = [_in_window(g, self.window) for g in gates]
        by_gate = [
            number_features(known, feature_identities(rows, g.bias, g.threshold))
            for g, rows in zip(gates, rows_of, strict=True)
        ]
        first: dict[int, tuple[int, int]] = {}
        for i, features in enumerate(by_gate):
            for k, feature in enumerate(features):
                first.setdefault(feature, (i, k))
        where = [first[feature] for feature in range(len(known))]
        self.rows = torch.stack([rows_of[i][k] for i, k in where])
        self.bias, self.threshold = (
            torch.stack([getattr(gates[i], name)[k] for i, k in where]) for name in ("bias", "threshold")
        )
        self.thresholds_are_zero = not bool(self.threshold.any())
        groups: dict[tuple[float, ...], list[int]] = {}
        for i, gate in enumerate(gates):
            groups.setdefault(tuple(gate.times.tolist()), []).append(i)
        self.order = [i for group in groups.values() for i in group]
        weight = self.rows.new_zeros(len(known), len(gates))
        for column, i in enumerate(self.order):
            weight[:, column].index_add_(0, torch.tensor(by_gate[i], device=weight.device), gates[i].weight)
        self.weight = weight
        # Pooling goes by share: columns of features, and their weights for all gates.
        self.pool_groups: list[tuple[float, Tensor | None, Tensor]] = []
        for share in dict.fromkeys(g.share for g in gates):
            columns = [column for column, i in enumerate(self.order) if gates[i].share == share]
            used = sorted({feature for column in columns for feature in by_gate[self.order[column]]})
            index = torch.tensor(used, device=weight.device)
            own = torch.zeros_like(weight)
            own[:, columns] = weight[:, columns]
            everything = len(used) == len(known)
            self.pool_groups.append((share, None if everything else index, own if everything else own[index]))
        self.bounds = [
            (
                bin_edges(gates[group[0]].times),
                torch.stack(
                    [torch.stack([g.low, g.high - g.low], 1) for g in (gates[i] for i in group)], 2
                ),  # low, and high above it: [T, 2, E]
            )
            for group in groups.values()
        ]
        # Edges between timesteps' bins, and the lower bounds in each: plain numbers, quick to look up.
        self.lows = [(edges.tolist(), bounds[:, 0].tolist()) for edges, bounds in self.bounds]

    def lows_at(self, timestep: Tensor) -> list[float]:
        """Return the lowest lower bound of each gate at these timesteps [B]. Waits for the device."""
        rows = [[low for edges, lows in self.lows for low in lows[bisect_left(edges, t)]] for t in timestep.tolist()]
        return [min(column) for column in zip(*rows, strict=True)]

    def evidence(self, x: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """x [B, P, d] -> evidence [B, E], pre-activations [B, P, f].

        grid: height and width of the P positions, for windows. Where x has NaN or infinity, evidence has.
        """
        pre = pre_activations(x, self.rows, self.bias, self.window, grid)
        threshold = None if self.thresholds_are_zero else self.threshold.to(pre)
        evidence: Tensor | None = None
        for share, index, weight in self.pool_groups:
            used = pre if index is None else pre.index_select(2, index)
            above = threshold if index is None or threshold is None else threshold[index]
            part = _pool(used, above, share) @ weight.to(pre)
            evidence = part if evidence is None else evidence + part
        assert evidence is not None
        return evidence, pre

    def bounds_at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] or [1] -> low [B, E], and how far high lies above it [B, E]."""
        found = [bounds.index_select(0, torch.bucketize(timestep, edges)) for edges, bounds in self.bounds]
        low, width = (found[0] if len(found) == 1 else torch.cat(found, 2)).unbind(1)
        return low, width

    def evidence_by_position(self, pre: Tensor) -> Tensor:
        """Pre-activations [B, P, f] -> evidence [B, P, E]."""
        return thresholded_activations(pre, self.threshold) @ self.weight.to(pre)


def _pool(pre: Tensor, threshold: Tensor | None, share: float) -> Tensor:
    """Return the mean over the strongest `share` of positions of what exceeds the threshold: [B, P, f] -> [B, f].

    threshold: [f], None for 0, which is quicker. As none is below 0, the strongest of all are those that exceed it.
    """
    top = pre.topk(max(1, round(pre.shape[1] * share)), 1).values if share < 1 else pre
    fired = top.relu() if threshold is None else top * (top > threshold)
    return fired.mean(1) + 0 * pre.sum(1)  # NaN where there is NaN or infinity
