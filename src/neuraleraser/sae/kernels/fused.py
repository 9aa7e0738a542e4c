"""One training step on a GPU, all of it queued without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.sae.architectures.architecture import ForwardResult, architecture_named
from neuraleraser.sae.kernels.decode import residual
from neuraleraser.sae.kernels.select import by_feature, select
from neuraleraser.sae.kernels.update import Adam, Extra, Moments, update
from neuraleraser.sae.losses import AUX_WEIGHT, max_revived, revival_error
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.train_settings import TrainSettings

DEAD_CHECK_EVERY = 8  # steps from one look at which features are dead to the next


class Watch:
    """State that a run on a GPU keeps between steps and may forget.

    The norm of the last gradient, and which features were dead LOOK to 2 * LOOK steps ago, which the host thus knows
    without waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self.norm = torch.zeros((), device=device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self._asked: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None

    def look(self, idle: Tensor, settings: TrainSettings, step: int) -> Tensor:
        """The features [m] that count as dead in this step."""
        if step % DEAD_CHECK_EVERY:
            return self.dead
        if self._asked is not None:
            order, count, made = self._asked
            if made is not None:
                made.synchronize()  # LOOK steps old: it has long been made
            self.dead = order[: int(count)]
        count = (idle >= settings.dead_after).sum()
        made = None
        if idle.is_cuda:
            here = torch.empty((), dtype=count.dtype, pin_memory=True)
            count, made = here.copy_(count, non_blocking=True), torch.cuda.Event()
            made.record()
        self._asked = idle.argsort(descending=True, stable=True), count, made
        return self.dead


@torch.no_grad()
def fused_step(
    w: Weights,
    optimiser: torch.optim.Optimizer,
    idle: Tensor,
    watch: Watch,
    x: Tensor,
    variance: float,
    settings: TrainSettings,
    at: int,
    matmul_dtype: torch.dtype,
) -> tuple[ForwardResult, Tensor, Tensor, Tensor]:
    """Step `at` (from 0) of BatchTopK or TopK on scaled x [B, d]: alters `w`, the state of `optimiser` (Adam, over
    `w`) and `idle` [n].

    -> (the pass; features that are dead; the revival loss; the gradient's norm), all on the device. The gradient is
    clipped to norm 1 as if it had the last step's norm: its own is known only when the weights have moved.
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
    idle.copy_(torch.where(counts > 0, 0, idle + b))

    dead = watch.look(idle, settings, at)
    aux, extra = x.new_zeros(()), None
    k_aux = min(max_revived(settings, at, *x.shape), max(1, len(dead) // 8))
    if len(dead) and k_aux:
        with torch.enable_grad():
            rows = [p[dead].requires_grad_() for p in w[:3]]
            aux = revival_error(Weights(rows[0], rows[1], rows[2], w.b_dec), x, e, k_aux, matmul_dtype)
            to_enc, to_bias, to_dec = torch.autograd.grad(AUX_WEIGHT * aux, rows)
        extra = Extra(dead, to_enc, to_bias, to_dec)
        aux = aux.detach()

    clip = (1 / (watch.norm + 1e-6)).clamp_max(1.0)
    adam = Adam(settings.lr_at(at, d), at + 1)
    factor = -2 / (b * variance)
    for p in w:
        if not optimiser.state[p]:  # as the optimiser itself would start
            optimiser.state[p] = {"step": x.new_zeros(()), "exp_avg": torch.zeros_like(p)}
            optimiser.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        optimiser.state[p]["step"].fill_(at + 1)
    parts = [Moments(p, optimiser.state[p]["exp_avg"], optimiser.state[p]["exp_avg_sq"]) for p in w]
    to_bias, total = update(e, into, order, factor, parts[0], parts[1], parts[2], adam, clip, extra)
    # b_dec enters twice: in x - b_dec, through the encoder as it was in this step, and by itself.
    to_b_dec = factor * e.sum(0, dtype=torch.float32) - (to_bias.to(matmul_dtype) @ w_enc).float()
    watch.norm = (total + to_b_dec.square().sum()).sqrt()
    _adam(parts[3], clip * to_b_dec, adam)
    fvu = squares / (b * variance)
    made = ForwardResult(fvu, fvu, e, counts, fired.cut)
    return made, (idle >= settings.dead_after).sum(), aux, watch.norm


def _adam(p: Moments, grad: Tensor, adam: Adam) -> None:
    """Adam's step of one tensor."""
    p.first.lerp_(grad, 1 - adam.beta1)
    p.second.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    root = p.second.sqrt() / (1 - adam.beta2**adam.step) ** 0.5
    p.weight.addcdiv_(p.first, root.add_(adam.eps), value=-adam.lr / (1 - adam.beta1**adam.step))
