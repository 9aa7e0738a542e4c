"""Losses that a step of training minimises beside the architecture's own: what labels ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.sae import supervised
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.train_settings import TrainSettings


def labelled_losses(
    w: Weights, x: Tensor, labels: Tensor, threshold: Tensor | float, settings: TrainSettings, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(binding loss, contrast loss) of scaled x [B, d] with labels [M, C] for B / M vectors each; 0 for what has no
    weight. `threshold`, a number or [n], is what features have to exceed. Neither moves the bias that all share, b_dec.
    """
    into = (x - w.b_dec.detach()).to(matmul_dtype)

    def pre(vectors: int, features: int) -> Tensor:
        w_enc = w.W_enc[:features].to(matmul_dtype).T
        return (into[:vectors] @ w_enc).to(x.dtype) + w.b_enc[:features]

    bind = contrast = x.new_zeros(())
    if settings.binding_weight:
        concepts = labels.shape[1]
        bound = threshold[:concepts] if isinstance(threshold, Tensor) and threshold.ndim else threshold
        bind = supervised.binding_loss(pre(len(x), concepts), labels, bound)
    if settings.contrast_weight:
        maps = min(len(labels), supervised.MAPS_AT_ONCE)
        contrast = supervised.contrast_loss(pre(maps * (len(x) // len(labels)), settings.n_features), labels[:maps])
    return bind, contrast
