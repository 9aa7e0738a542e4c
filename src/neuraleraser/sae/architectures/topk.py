"""TopK: of every vector the k largest pre-activations fire; thresholds come once training is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neuraleraser.sae import sparse_ops
from neuraleraser.sae.architectures.architecture import Architecture, ForwardResult, pre_activations, sparse_forward
from neuraleraser.sae.conversion import Source, to_sae
from neuraleraser.sae.model import SAE
from neuraleraser.sae.sparse_ops import Fired, Weights, fired_pairs
from neuraleraser.sae.train_settings import TrainSettings


class TopK(Architecture):
    """Every feature gets the threshold by which it fires as often on the first vectors as it does among the k largest:
    as for a TopK dictionary that is read from a file."""

    kernel = "row"

    def forward(
        self,
        w: Weights,
        extra_parameters: Mapping[str, Tensor],
        x: Tensor,
        variance: float,
        settings: TrainSettings,
        matmul_dtype: torch.dtype,
    ) -> ForwardResult:
        """Reconstruct from what fires."""
        with torch.no_grad():
            fired = select_rows(pre_activations(w, x, matmul_dtype), len(x), settings.n_features, settings.k)
        return sparse_forward(w, x, fired, mean_smallest(fired), variance, matmul_dtype)

    def finish(self, sae: SAE, settings: TrainSettings, first: Callable[[], Tensor]) -> SAE:
        """Return the SAE with thresholds of its own; `header["calibration"]` gets what was measured on a quarter of the
        first vectors that is held out. Raises DataError for fewer than 4 of them."""
        x = first()
        sae = sae.to(x.device)
        source = Source(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k=settings.k)
        return to_sae(source, Path("a trained TopK dictionary"), x, sae.header).to(x.device)


def select_rows(pre: Callable[[slice], Tensor], b: int, n: int, k: int) -> Fired:
    """TopK (Gao et al. 2024): z = pre where pre > 0 and among the k largest of its vector, else 0.

    `pre` gives rows of the pre-activations: pre(rows) [len(rows), n]. Of equal values any may be kept.
    """
    step = max(1, sparse_ops.PRE_ACTIVATIONS_AT_ONCE // n)
    flat, values = [], []
    for start in range(0, b, step):
        cols = (block := pre(slice(start, min(start + step, b)))).topk(k, dim=1, sorted=False).indices.sort(1).values
        top = block.gather(1, cols)
        rows = torch.arange(start, start + len(block), device=block.device)[:, None]
        flat.append((rows * n + cols)[top > 0])
        values.append(top[top > 0])
    return fired_pairs(torch.cat(flat), torch.cat(values), b, n)


def mean_smallest(fired: Fired) -> Tensor:
    """Return what a feature had to exceed to be kept: the smallest kept value of a vector, on average over vectors
    that have any; 0 where none has."""
    if not len(fired.values):
        return fired.values.new_zeros(())
    least = fired.values.new_full((len(fired.row_start),), torch.inf)
    least = least.scatter_reduce(0, fired.rows, fired.values, "amin")
    return least[least < torch.inf].float().mean()
