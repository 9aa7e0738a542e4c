"""Matryoshka BatchTopK: the first features alone have to reconstruct too, so that broad ones come first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from neuraleraser.sae.architectures.architecture import ForwardResult, unexplained
from neuraleraser.sae.architectures.batchtopk import BatchTopK, fire_batch, smallest_fired
from neuraleraser.sae.sparse_ops import Fired, Weights, decode_at, encode_at, fired_pairs
from neuraleraser.sae.train_settings import TrainSettings

HALVINGS = 4


class Matryoshka(BatchTopK):
    """BatchTopK of nested dictionaries. The kernels for GPUs do not know its loss."""

    kernel = None

    def forward(
        self,
        w: Weights,
        extra_parameters: Mapping[str, Tensor],
        x: Tensor,
        variance: float,
        settings: TrainSettings,
        matmul_dtype: torch.dtype,
    ) -> ForwardResult:
        """Reconstruct from what fires; the main loss is the mean over the nested dictionaries."""
        fired = fire_batch(w, x, settings, matmul_dtype)
        residuals = nested_residuals(w, x, fired, nested_sizes(settings.n_features))
        nested = torch.stack([unexplained(r, variance) for r in residuals])
        return ForwardResult(nested.mean(), nested[-1].detach(), residuals[-1], fired.counts, smallest_fired(fired))


def nested_sizes(n: int) -> tuple[int, ...]:
    """The sizes of the nested dictionaries of n features: n / 16, n / 8, n / 4, n / 2 and n."""
    return tuple(sorted({max(1, n >> i) for i in range(HALVINGS + 1)}))


def nested_residuals(w: Weights, x: Tensor, fired: Fired, sizes: tuple[int, ...]) -> list[Tensor]:
    """x - x_hat_m [B, d] for every m of the ascending `sizes`, the last of which is n:

        x_hat_m = sum of z_i d_i over the features i < m, + b_dec

    z are the values of BatchTopK over the whole dictionary, `fired`. Bussmann et al. 2025 (Learning multi-level
    features with Matryoshka sparse autoencoders) minimise the sum of ||x - x_hat_m||^2 over m; we take the mean,
    which is of the size of one reconstruction. A feature is held to what all dictionaries it is part of need, so a
    broad concept is not split up into, and hidden by, its narrow cases.
    """
    values = encode_at(w, x, fired)
    residual, residuals = x - w.b_dec, []
    for start, stop in pairwise((0, *sizes)):
        chosen = ((fired.cols >= start) & (fired.cols < stop)).nonzero().squeeze(1)
        width = stop - start
        part = fired_pairs(fired.rows[chosen] * width + fired.cols[chosen] - start, fired.values[chosen], len(x), width)
        residual = residual - decode_at(values[chosen], w.W_dec[start:stop], part)
        residuals.append(residual)
    return residuals
