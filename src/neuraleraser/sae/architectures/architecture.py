"""Contract of an architecture, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from neuraleraser.sae.architectures import ARCHITECTURES
from neuraleraser.sae.model import SAE
from neuraleraser.sae.sparse_ops import Fired, Weights, unexplained_at
from neuraleraser.sae.train_settings import TrainSettings


class ForwardResult(NamedTuple):
    """Result of one batch of scaled activations [B, d]."""

    loss: Tensor  # scalar, to be minimised
    fvu: Tensor  # scalar, ||x - x_hat||^2 over the variance, without gradient
    residual: Tensor  # [B, d], x - x_hat
    counts: Tensor  # [n] integers, how often each feature fired
    firing_threshold: Tensor  # scalar, what a feature had to exceed to fire; 0 where none fired


class Architecture(ABC):
    """Rule by which features fire in training, with its loss; and the thresholds by which they fire afterwards.

    `extra_parameters` are the tensors that it learns beside the weights, by the names in `learns`. Activations x [B, d]
    are scaled to E||x||^2 = d; `variance` is that of the first vectors, large products may be made in `matmul_dtype`.
    """

    learns: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors [n] that it learns beside the weights: `start` makes them, a checkpoint holds them."""
    kernel: ClassVar[Literal["batch", "row"] | None] = None
    """The kernels for GPUs can train it if it is the plain loss over the k a row largest of the batch, or over the k
    largest of each row; None: it runs on torch's own operations."""

    def start(self, w: Weights, x: Tensor, settings: TrainSettings) -> dict[str, Tensor]:
        """Return what it learns beside the untrained weights, from the first vectors x [M, d]."""
        return {}

    @abstractmethod
    def forward(
        self,
        w: Weights,
        extra_parameters: Mapping[str, Tensor],
        x: Tensor,
        variance: float,
        settings: TrainSettings,
        matmul_dtype: torch.dtype,
    ) -> ForwardResult:
        """Reconstruct x [B, d]. The loss is mean ||x - x_hat||^2 / `variance`, and what the architecture adds."""

    def last_firing_threshold(self, w: Weights, x: Tensor, settings: TrainSettings) -> Tensor | None:
        """Return the firing threshold of x [B, d] in full precision, whose mean over the last steps is the threshold;
        None where the moving average of `ForwardResult.firing_threshold` is good enough."""
        return None

    def threshold(self, extra_parameters: Mapping[str, Tensor], average: Tensor | float) -> Tensor | float:
        """Return what features exceed to fire alone: a number for all, or [n]. `average`: the moving average of the
        batches' firing thresholds."""
        return average

    def finish(self, sae: SAE, settings: TrainSettings, first: Callable[[], Tensor]) -> SAE:
        """Return the trained SAE, on raw activations, with its last thresholds. `first` reads the first vectors of the
        stream again, [M, d] raw."""
        return sae


def architecture_named(name: str) -> Architecture:
    """Return the architecture of this name in `ARCHITECTURES`."""
    return _load(ARCHITECTURES[name])


@cache
def _load(where: str) -> Architecture:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)()


def unexplained(residual: Tensor, variance: float) -> Tensor:
    """Return mean ||residual||^2 of [B, d], over `variance`: a scalar."""
    return residual.square().sum() / (len(residual) * variance)


def pre_activations(w: Weights, x: Tensor, matmul_dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """Return a function of rows of x [B, d] that makes their pre-activations, [len(rows), n], in `matmul_dtype`."""
    into, w_enc, b_enc = (x - w.b_dec).to(matmul_dtype), w.W_enc.to(matmul_dtype).T, w.b_enc.to(matmul_dtype)
    return lambda rows: torch.addmm(b_enc, into[rows], w_enc)


def sparse_forward(
    w: Weights, x: Tensor, fired: Fired, firing_threshold: Tensor, variance: float, matmul_dtype: torch.dtype
) -> ForwardResult:
    """Return the result in which `fired` reconstructs x [B, d], without any other term."""
    squares, residual = unexplained_at(w, x, fired, matmul_dtype)
    loss = squares / (len(x) * variance)
    return ForwardResult(loss, loss.detach(), residual, fired.counts, firing_threshold)
