"""One step of training: what a state is, and how a batch moves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from neuraleraser.errors import DataError, SettingsError
from neuraleraser.precision import has_bf16
from neuraleraser.sae import kernels
from neuraleraser.sae.adam import Adam
from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.losses import labelled_losses
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.train_settings import StepLog, TrainSettings

THRESHOLD_RATE = 0.01  # of the moving average of the firing threshold
MAX_THRESHOLD_STEPS = 8
"""At most so many steps, one in 25 of all, whose mean firing threshold in full precision is the threshold in the end,
later ones weighing more. The moving average lags behind one that still falls, and where many features are nearly alike
one percent of it decides on a tenth of what fires (docs/LOG.md)."""
THRESHOLD_SAMPLE = 2**22  # pre-activations that it is taken from, about
CACHE_VALUES = 2**18  # values of a matrix that are worked on at a time: 1 MB
LIFT = 1.5  # learning rates times the firing threshold that a dead feature's bias rises by in a step


@dataclass
class State:
    """All that a training run is at a step: what a checkpoint holds."""

    weights: Weights  # for scaled data
    optimiser: Adam
    idle: Tensor  # [n] int64, vectors since each feature last fired
    scale: float  # raw activations are multiplied by this
    variance: float  # mean ||x - mean||^2 of the first vectors, scaled
    threshold: float | Tensor = 0.0  # on a GPU a scalar there, which the host has not waited for
    step: int = 0
    concepts: int = 0  # that the labels tell apart, in labelled training
    extra_parameters: dict[str, Tensor] = field(default_factory=dict)  # what the architecture learns beside the weights
    bad: Tensor | None = None  # on a GPU: the first batch with NaN or infinity, as a scalar; -1: none yet
    last_norm: Tensor | None = None  # of the gradient, which the kernels for GPUs clip by; in no checkpoint
    whole: bool = True  # no step is half done
    log: Callable[[], StepLog] | None = None  # reads the last step's; raises where training has diverged

    def parameters(self) -> dict[str, Tensor]:
        """Parameters that are learnt, by name."""
        return self.weights._asdict() | self.extra_parameters


def train_step(state: State, x: Tensor, labels: Tensor | None, settings: TrainSettings) -> Callable[[], StepLog]:
    """Take one step on scaled activations x [B, d], with labels [M, C] in labelled training; alters `state` in place.

    Returns a function that reads the step's log. On a GPU only that waits for the device, and raises the SettingsError
    of divergence and the DataError of NaN or infinity in x (which count as 0 until then); on a CPU divergence is raised
    at once, and x is known to be finite.
    """
    waits = kernels.on_gpu(x)
    if waits:
        x = _without_nonfinite(state, x)
    matmul_dtype = torch.bfloat16 if settings.bf16 and (waits or has_bf16()) else x.dtype
    lr = settings.lr_at(state.step, x.shape[1])
    if kernels.usable(x, settings, labels is not None):
        result = _fused_step(state, x, settings, matmul_dtype)
    else:
        result = plain_step(state, x, labels, settings, matmul_dtype, lr)

    def checked_norm() -> float:
        if bad is not None and (first := int(bad)) >= 0:
            raise DataError(f"batch {first} holds NaN or infinite values: mend their source")
        norm = float(result.grad_norm)
        if not math.isfinite(norm):
            raise SettingsError(f"training diverged at step {done - 1} (gradient {norm}): lower learning_rate")
        return norm

    done, vectors, n = state.step + 1, len(x), settings.n_features  # not x itself, which the log would keep alive
    bad = state.bad
    if not waits:
        checked_norm()
    state.idle = torch.where(result.counts > 0, 0, state.idle + vectors)
    dead = state.idle >= settings.dead_after
    bound = state.concepts if settings.fisher_features or settings.binding_weight else 0  # they answer to their labels
    with torch.no_grad():
        lift_dead(state.weights.b_enc[bound:], dead[bound:], result.firing_threshold, lr)
    firing_threshold = result.firing_threshold if waits else float(result.firing_threshold)
    rate = min(1.0, max(THRESHOLD_RATE, 10 / done))  # faster at first, when it moves
    last = max(1, min(MAX_THRESHOLD_STEPS, settings.steps // 25))
    if done > settings.steps - last:
        some = x[:: max(1, len(x) * n // THRESHOLD_SAMPLE)]  # in full precision, all would take several steps' time
        final = architecture_named(settings.architecture).last_firing_threshold(state.weights, some, settings)
        if final is not None:
            i = done - settings.steps + last  # of `last`: the mean weighs each by i^3, as early weights still move
            rate, firing_threshold = 4 * i / (i + 1) ** 2, final if waits else float(final)
    moved = state.threshold + rate * (firing_threshold - state.threshold)
    if isinstance(firing_threshold, Tensor):
        state.threshold = torch.where(firing_threshold > 0, moved, state.threshold)
    elif firing_threshold > 0:
        state.threshold = moved
    state.step, threshold = done, state.threshold
    fired, died = result.counts.sum(), dead.sum()

    def log() -> StepLog:
        norm = checked_norm()
        return StepLog(
            step=done,
            vectors=vectors,
            fvu=float(result.fvu),
            l0=float(fired) / vectors,
            dead=float(died) / n,
            threshold=float(threshold),
            learning_rate=lr,
            grad_norm=norm,
            bind=float(result.bind),
            contrast=float(result.contrast),
        )

    state.log = log
    return log


def lift_dead(b_enc: Tensor, dead: Tensor, firing_threshold: Tensor, lr: float) -> None:
    """Raise the biases b_enc [n] of features that are `dead` [n] by LIFT * lr * firing_threshold.

    Step by step, until they fire. A feature that comes back fires first where it exceeds the threshold by next to
    nothing, for few vectors, in place of another that did: it does little harm, and learns from then on by the
    gradient that all learn by. An auxiliary loss (AuxK, Gao et al. 2024) costs passes of its own, and where the
    residual is much smaller than any activation that fires, what it teaches fires too strongly and spoils the others'
    work (docs/LOG.md). Biases that keep balance are known from mixtures of experts (Wang et al. 2024,
    Auxiliary-loss-free load balancing strategy for mixture-of-experts).
    """
    b_enc.add_(dead * firing_threshold, alpha=LIFT * lr)


def _without_nonfinite(state: State, x: Tensor) -> Tensor:
    """Return x with 0 for NaN and infinity; notes the step of the first batch that had any."""
    bad = ~torch.isfinite(x)
    was = torch.full((), -1, device=x.device) if state.bad is None else state.bad
    state.bad = torch.where((was < 0) & bad.any(), state.step, was)
    return x.masked_fill(bad, 0.0)


class _StepResult(NamedTuple):
    """Outcome of a step: scalars, on a GPU not yet known to the host."""

    firing_threshold: Tensor  # 0 where nothing fired
    fvu: Tensor
    counts: Tensor  # [n], how often each feature fired
    grad_norm: Tensor
    bind: Tensor | float = 0.0
    contrast: Tensor | float = 0.0


def _fused_step(state: State, x: Tensor, settings: TrainSettings, matmul_dtype: torch.dtype) -> _StepResult:
    """The step by the kernels for GPUs; without waiting for the device."""
    from neuraleraser.sae.kernels.fused import fused_step

    if state.last_norm is None:
        state.last_norm = torch.zeros((), device=x.device)
    result, state.last_norm = fused_step(
        state.weights, state.optimiser, state.last_norm, x, state.variance, settings, state.step, matmul_dtype
    )
    return _StepResult(result.firing_threshold, result.fvu, result.counts, state.last_norm)


def plain_step(
    state: State, x: Tensor, labels: Tensor | None, settings: TrainSettings, matmul_dtype: torch.dtype, lr: float
) -> _StepResult:
    """The step by torch's operations, for every architecture and loss."""
    w = state.weights
    architecture = architecture_named(settings.architecture)
    result = architecture.forward(w, state.extra_parameters, x, state.variance, settings, matmul_dtype)
    loss = result.loss
    bind = contrast = x.new_zeros(())
    if labels is not None:
        threshold = architecture.threshold(state.extra_parameters, state.threshold)
        bind, contrast = labelled_losses(w, x, labels, threshold, settings, matmul_dtype)
        loss = loss + settings.binding_weight * bind + settings.contrast_weight * contrast
    learnt = list(state.parameters().values())
    for p, grad in zip(learnt, torch.autograd.grad(loss, learnt), strict=True):
        p.grad = grad
    with torch.no_grad():
        grads = [p.grad for p in learnt if p.grad is not None]
        if settings.fisher_features:  # set in closed form, and held
            for grad in grads[:2]:  # of W_enc and b_enc
                grad[: state.concepts] = 0
        # By rows that fit into a processor's cache, where these products of whole matrices would not.
        rows = settings.n_features if kernels.on_gpu(x) else max(1, CACHE_VALUES // x.shape[1])
        # What only lengthens a decoder row is undone by the normalisation below, but would mislead Adam.
        for grad, row in zip(grads[2].split(rows), w.W_dec.split(rows), strict=True):
            grad.addcmul_((grad * row).sum(1, keepdim=True), row, value=-1)
        norm = torch.nn.utils.get_total_norm(grads)
        if kernels.on_gpu(x) or norm > 1:
            torch.nn.utils.clip_grads_with_norm_(learnt, 1.0, norm)
        if kernels.on_gpu(x) or math.isfinite(norm):
            state.optimiser.step(lr)
            for row in w.W_dec.split(rows):
                row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True))
    return _StepResult(result.firing_threshold, result.fvu, result.counts, norm, bind.detach(), contrast.detach())
