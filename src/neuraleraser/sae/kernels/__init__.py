"""Triton kernels for training on a GPU: selection, sparse decoding, and one pass from residuals to new weights.

Written from scratch after no other library's. Triton comes with CUDA builds of torch and is imported only when a step
uses it; `usable` is the one place that decides. No figure of their speed exists yet: they were checked against plain
torch code, through Triton's interpreter on a CPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.train_settings import TrainSettings


def on_gpu(x: Tensor) -> bool:
    """True if reading a number made from x makes the host wait for a device."""
    return x.is_cuda


def usable(x: Tensor, settings: TrainSettings, labelled: bool) -> bool:
    """True if these kernels train on x: an architecture that they know, without labels, on a GPU that has bfloat16
    (Ampere, 2020, or later), where Triton is installed. All else runs on torch's own operations."""
    return (
        on_gpu(x)
        and architecture_named(settings.architecture).kernel is not None
        and not labelled
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and find_spec("triton") is not None
    )
