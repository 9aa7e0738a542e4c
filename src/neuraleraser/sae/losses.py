"""Losses that a step of training minimises beside the architecture's own: revival, and what labels ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.sae import supervised
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.train_settings import TrainSettings

AUX_WEIGHT = 1 / 32  # Gao et al. 2024, Scaling and evaluating sparse autoencoders, appendix A.2
SETTLING_PERIODS = 10  # times `dead_after`: what a revived feature is given to settle in


def max_revived(settings: TrainSettings, step: int, vectors: int, d: int) -> int:
    """Return how many dead features of width d may explain a vector's residual at this step, of batches of `vectors`.

    0 near the end: a feature that comes back spoils the others' work for a while (docs/LOG.md).
    """
    if (settings.steps - step) * vectors < SETTLING_PERIODS * settings.dead_after:
        return 0
    return d // 2 if settings.k_aux is None else settings.k_aux


def bounded_revival_loss(
    w: Weights, x: Tensor, residual: Tensor, dead: Tensor, k_aux: int, matmul_dtype: torch.dtype
) -> Tensor:
    """Return the revival loss with up to k_aux of the `dead` features [m] a vector, but at most an eighth of them.

    0 with none dead or k_aux = 0.
    """
    if len(dead) == 0 or k_aux == 0:
        return residual.new_zeros(())
    # All dead features at once would be a linear autoencoder, and learn mixtures of what is missing. In a trial
    # (64 planted directions) 14 % stayed dead with up to d / 2 of them, 3 % with at most an eighth.
    return revival_loss(w, x, residual, dead, min(k_aux, max(1, len(dead) // 8)), matmul_dtype)


def revival_loss(
    w: Weights, x: Tensor, residual: Tensor, dead: Tensor, k_aux: int, matmul_dtype: torch.dtype
) -> Tensor:
    """Return ||e - e_hat||^2 / ||e||^2 (scalar), where e = `residual` [B, d] = x - x_hat, held fixed, and e_hat is
    what the k_aux largest pre-activations of each vector among the `dead` features [m] decode to, without
    b_dec. Large products are made in dtype `matmul_dtype`.

    AuxK of Gao et al. 2024. It teaches dead features, and only them, to add what is missing. Values are taken
    with their sign: after a ReLU, a feature that is negative everywhere would have no gradient to return by.
    """
    return revival_error(
        Weights(w.W_enc[dead], w.b_enc[dead], w.W_dec[dead], w.b_dec), x, residual, k_aux, matmul_dtype
    )


def revival_error(dead: Weights, x: Tensor, residual: Tensor, k_aux: int, matmul_dtype: torch.dtype) -> Tensor:
    """Return `revival_loss`, given the rows of the dead features alone (and the b_dec that all share)."""
    e = residual.detach().to(x.dtype)
    into = (x - dead.b_dec.detach()).to(matmul_dtype)
    pre = (into @ dead.W_enc.to(matmul_dtype).T).to(x.dtype) + dead.b_enc
    if k_aux < pre.shape[1]:
        values, cols = pre.topk(k_aux, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, cols, values)
    e_hat = (pre.to(matmul_dtype) @ dead.W_dec.to(matmul_dtype)).to(x.dtype)
    return (e - e_hat).square().sum() / e.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


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
