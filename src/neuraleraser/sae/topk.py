"""TopK: of every vector the k largest pre-activations fire; thresholds come once training is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.sae import sparse_ops
from neuraleraser.sae.conversion import Source, to_sae
from neuraleraser.sae.model import SAE
from neuraleraser.sae.sparse_ops import Fired, Weights, pairs


def select_rows(pre: Callable[[slice], Tensor], b: int, n: int, k: int) -> Fired:
    """TopK (Gao et al. 2024): z = pre where pre > 0 and among the k largest of its vector, else 0.

    `pre` gives rows of the pre-activations: pre(rows) [len(rows), n]. Of equal values any may be kept.
    """
    step = max(1, sparse_ops.BLOCK // n)
    flat, values = [], []
    for start in range(0, b, step):
        cols = (block := pre(slice(start, min(start + step, b)))).topk(k, dim=1, sorted=False).indices.sort(1).values
        top = block.gather(1, cols)
        rows = torch.arange(start, start + len(block), device=block.device)[:, None]
        flat.append((rows * n + cols)[top > 0])
        values.append(top[top > 0])
    return pairs(torch.cat(flat), torch.cat(values), b, n)


def mean_cut(fired: Fired) -> Tensor:
    """Return what a feature had to exceed to be kept: the smallest kept value of a vector, on average over vectors
    that have any."""
    least = fired.values.new_full((len(fired.row_start),), torch.inf)
    least = least.scatter_reduce(0, fired.rows, fired.values, "amin")
    return least[least < torch.inf].float().mean()


def calibrated(w: Weights, k: int, x: Tensor, header: dict[str, Any]) -> SAE:
    """The SAE with these weights, and for every feature the threshold by which it fires as often on x [M, d] as it
    does among the k largest: as for a TopK dictionary that is read from a file. `header["calibration"]` gets what
    was measured on a quarter of x that is held out. Raises DataError for fewer than 4 vectors."""
    source = Source(*(p.detach() for p in w), k=k)
    return to_sae(source, Path("a trained TopK dictionary"), x, header).to(x.device)
