"""BatchTopK: of a whole batch the k a vector largest pre-activations fire (Bussmann et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from neuraleraser.sae.architectures.architecture import Architecture, ForwardResult, pre_activations, sparse_forward
from neuraleraser.sae.sparse_ops import Fired, Weights, select
from neuraleraser.sae.train_settings import TrainSettings


class BatchTopK(Architecture):
    """The moving average of the smallest value that fires becomes the threshold of every feature."""

    kernel: ClassVar[Literal["batch", "row"] | None] = "batch"

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
        fired = fire_batch(w, x, settings, matmul_dtype)
        return sparse_forward(w, x, fired, smallest_fired(fired), variance, matmul_dtype)

    def last_firing_threshold(self, w: Weights, x: Tensor, settings: TrainSettings) -> Tensor:
        """Return the smallest value that fires."""
        return smallest_fired(fire_batch(w, x, settings, x.dtype))


@torch.no_grad()
def fire_batch(w: Weights, x: Tensor, settings: TrainSettings, matmul_dtype: torch.dtype) -> Fired:
    """Return the pairs of scaled x [B, d] that fire."""
    return select(pre_activations(w, x, matmul_dtype), len(x), settings.n_features, len(x) * settings.k)


def smallest_fired(fired: Fired) -> Tensor:
    """Return the smallest value that fires, a scalar; 0 where none does."""
    return fired.values.min() if len(fired.values) else fired.values.new_zeros(())
