"""One training step on a GPU, all of it queued without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.sae.adam import Adam as Optimiser
from neuraleraser.sae.architectures.architecture import ForwardResult, architecture_named
from neuraleraser.sae.kernels.decode import residual
from neuraleraser.sae.kernels.select import by_feature, select
from neuraleraser.sae.kernels.update import Adam, Moments, update
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.train_settings import TrainSettings


@torch.no_grad()
def fused_step(
    w: Weights,
    optimiser: Optimiser,
    last_norm: Tensor,
    x: Tensor,
    variance: float,
    settings: TrainSettings,
    at: int,
    matmul_dtype: torch.dtype,
) -> tuple[ForwardResult, Tensor]:
    """Step `at` (from 0) of BatchTopK or TopK on scaled x [B, d]: alters `w` and the state of `optimiser` (Adam, over
    `w`).

    -> (the pass; the gradient's norm), all on the device. The gradient is clipped to norm 1 as if it had the last
    step's norm, `last_norm`: its own is known only when the weights have moved.
    """
    b, d, n = len(x), x.shape[1], settings.n_features
    centred = x - w.b_dec
    into, w_enc, w_dec = centred.to(matmul_dtype), w.W_enc.to(matmul_dtype), w.W_dec.to(matmul_dtype)
    pre = torch.addmm(w.b_enc.to(matmul_dtype), into, w_enc.T)
    fired = select(pre, settings.k, per_row=architecture_named(settings.architecture).kernel == "row")
    del pre
    order = by_feature(fired, n)
    counts = order.start.diff()
    e, squares = residual(centred, w_dec, fired)
    clip = (1 / (last_norm + 1e-6)).clamp_max(1.0)
    adam = Adam(settings.lr_at(at, d), at + 1)
    factor = -2 / (b * variance)
    for p in w:
        optimiser.state[p]["step"].fill_(at + 1)
    parts = [Moments(p, optimiser.state[p]["exp_avg"], optimiser.state[p]["exp_avg_sq"]) for p in w]
    to_bias, total = update(e, into, order, factor, parts[0], parts[1], parts[2], adam, clip)
    # b_dec enters twice: in x - b_dec, through the encoder as it was in this step, and by itself.
    to_b_dec = factor * e.sum(0, dtype=torch.float32) - (to_bias.to(matmul_dtype) @ w_enc).float()
    norm = (total + to_b_dec.square().sum()).sqrt()
    _adam(parts[3], clip * to_b_dec, adam)
    fvu = squares / (b * variance)
    return ForwardResult(fvu, fvu, e, counts, fired.cut), norm


def _adam(p: Moments, grad: Tensor, adam: Adam) -> None:
    """Adam's step of one tensor."""
    p.first.lerp_(grad, 1 - adam.beta1)
    p.second.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    root = p.second.sqrt() / (1 - adam.beta2**adam.step) ** 0.5
    p.weight.addcdiv_(p.first, root.add_(adam.eps), value=-adam.lr / (1 - adam.beta1**adam.step))
