"""The gates of many erasers at one site as a few tensors, so that their cost hardly grows with their number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuraleraser.eraser.gate import Gate, bin_edges, pre_activations


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

    The arithmetic is that of `Gate`.
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

    def __call__(
        self, x: Tensor, timestep: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, P, d], timestep [B] or [1] -> opening [B, E], evidence [B, E], features z [B, P, f].

        grid: height and width of the P positions, for windows. Where x has NaN or infinity, evidence has.
        """
        pre = pre_activations(x, self.rows, self.bias, self.window, grid)
        z = pre * (pre > self.threshold.to(pre))  # a product, so that NaN is not taken for "does not fire"
        evidence: Tensor | None = None
        for share, index, weight in self.pool_groups:
            used = z if index is None else z.index_select(2, index)
            if share < 1:
                used = used.topk(max(1, round(used.shape[1] * share)), 1).values
            part = used.mean(1) @ weight.to(z)
            evidence = part if evidence is None else evidence + part
        assert evidence is not None
        found = [bounds.index_select(0, torch.bucketize(timestep, edges)) for edges, bounds in self.bounds]
        low, width = (found[0] if len(found) == 1 else torch.cat(found, 2)).to(evidence).unbind(1)
        return ((evidence - low) / width).clamp(0, 1), evidence, z

    def evidence_by_position(self, z: Tensor) -> Tensor:
        """z [B, P, f] -> evidence [B, P, E]."""
        return z @ self.weight.to(z)
