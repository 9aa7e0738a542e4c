"""JumpReLU: every feature learns its own threshold, through straight-through estimators.

    pre = (x - b_dec) W_enc^T + b_enc,   theta = exp(log_threshold),   H(u) = 1 where u > 0, else 0
    z   = pre * H(pre - theta)
    L   = ||x - x_hat||^2 / variance + (L0 / k - 1)^2,   L0 = sum_i H(pre_i - theta_i), mean over the batch

Neither z nor L0 has a useful derivative by theta: almost everywhere it is 0. Rajamanoharan et al. 2024 (Jumping
ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders) put in its place what the derivative of
the expected loss is when the density of pre at theta is estimated with a kernel K of width eps, here a rectangle,
K(u) = 1 where |u| < 1/2:

    dz/dtheta = -(theta / eps) K((pre - theta) / eps)        dz/dpre = H(pre - theta)
    dH/dtheta = -(1 / eps) K((pre - theta) / eps)            dH/dpre = 0

Their penalty is lambda * L0; the form with a target, which they name for a wanted sparsity and dictionary_learning
uses, lets k mean here what it means in the other architectures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from neuraleraser.sae.architectures.architecture import Architecture, ForwardResult, unexplained
from neuraleraser.sae.sparse_ops import Weights, select
from neuraleraser.sae.train_settings import TrainSettings

KERNEL_WIDTH = 0.2  # eps, in units of sqrt(d / k): the activation of k equal features, in data scaled to E||x||^2 = d
INIT_SAMPLE = 4096  # vectors that the first thresholds are set by

LOG_THRESHOLD = "log_threshold"


class JumpReLU(Architecture):
    """The thresholds are what it has learnt."""

    learns = (LOG_THRESHOLD,)

    def start(self, w: Weights, x: Tensor, settings: TrainSettings) -> dict[str, Tensor]:
        """Return the thresholds of features that fire as often as they are to."""
        return {LOG_THRESHOLD: first_log_threshold(w, x, settings.k)}

    def forward(
        self,
        w: Weights,
        extra_parameters: Mapping[str, Tensor],
        x: Tensor,
        variance: float,
        settings: TrainSettings,
        matmul_dtype: torch.dtype,
    ) -> ForwardResult:
        """Reconstruct from what fires; the main loss has the penalty on L0."""
        residual, penalty, counts = jump_losses(w, extra_parameters[LOG_THRESHOLD], x, settings.k, matmul_dtype)
        fvu = unexplained(residual, variance)
        return ForwardResult(
            fvu + penalty, fvu.detach(), residual, counts, extra_parameters[LOG_THRESHOLD].detach().exp().mean()
        )

    def threshold(self, extra_parameters: Mapping[str, Tensor], average: Tensor | float) -> Tensor:
        """Return the thresholds that are learnt, [n]."""
        return extra_parameters[LOG_THRESHOLD].detach().exp()


class _Fire(torch.autograd.Function):
    """z [B, n] of pre [B, n] and theta [n]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.eps = eps
        return torch.where(pre > theta, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        pre, theta = ctx.saved_tensors
        near = (pre - theta).abs() < ctx.eps / 2
        to_theta = -(theta / ctx.eps) * torch.where(near, grad, 0.0).sum(0)
        return torch.where(pre > theta, grad, 0.0), to_theta, None


class _Count(torch.autograd.Function):
    """L0, a scalar, of pre [B, n] and theta [n]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.near = (pre - theta).abs() < eps / 2
        ctx.eps = eps
        return (pre > theta).sum().to(pre.dtype) / len(pre)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore
        return None, -grad / (ctx.eps * len(ctx.near)) * ctx.near.sum(0), None


def jump_relu(pre: Tensor, theta: Tensor, eps: float) -> Tensor:
    """z [B, n] of pre [B, n] and theta [n], with the estimators of width eps for gradients."""
    return _Fire.apply(pre, theta, eps)  # pyright: ignore[reportReturnType]


def mean_l0(pre: Tensor, theta: Tensor, eps: float) -> Tensor:
    """L0 (scalar) of pre [B, n] and theta [n], with the estimator of width eps for its gradient by theta."""
    return _Count.apply(pre, theta, eps)  # pyright: ignore[reportReturnType]


def jump_losses(
    w: Weights, log_threshold: Tensor, x: Tensor, k: int, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - x_hat [B, d], (L0 / k - 1)^2, how often each feature fired [n]) of scaled x [B, d].

    Dense, in work that grows with B * n: large products are made in dtype `matmul_dtype`.
    """
    eps = KERNEL_WIDTH * math.sqrt(x.shape[1] / k)
    theta = log_threshold.exp()
    pre = linear((x - w.b_dec).to(matmul_dtype), w.W_enc.to(matmul_dtype)).to(x.dtype) + w.b_enc
    z = jump_relu(pre, theta, eps)
    x_hat = (z.to(matmul_dtype) @ w.W_dec.to(matmul_dtype)).to(x.dtype) + w.b_dec
    return x - x_hat, (mean_l0(pre, theta, eps) / k - 1).square(), (z.detach() > 0).sum(0)


@torch.no_grad()
def first_log_threshold(w: Weights, x: Tensor, k: int) -> Tensor:
    """log_threshold [n] by which untrained features fire k times for a vector of x [M, d], on average."""
    x = x[:INIT_SAMPLE] - w.b_dec
    fired = select(lambda rows: linear(x[rows], w.W_enc, w.b_enc), len(x), len(w.b_enc), len(x) * k)
    # Where fewer than k are positive the cut would be next to 0, and a feature could not learn a larger one soon.
    cut = max(float(fired.values.min()), 1e-3) if len(fired.values) else 1.0
    return torch.full_like(w.b_enc, math.log(cut))
