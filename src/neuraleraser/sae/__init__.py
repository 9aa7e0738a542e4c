"""Sparse autoencoders over activations: the model, its training as a function over a stream, its measures.

Nothing here knows an image or a pipeline. Names load when first used, so that `neuraleraser.sae.train_settings`
stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuraleraser.sae.architectures import ARCHITECTURES
    from neuraleraser.sae.architectures.architecture import Architecture
    from neuraleraser.sae.memory_batches import labelled_batches, pool_batches
    from neuraleraser.sae.mixing_buffer import MixingBuffer
    from neuraleraser.sae.model import SAE
    from neuraleraser.sae.quality import measure_sae
    from neuraleraser.sae.train_settings import StepLog, TrainSettings
    from neuraleraser.sae.training import Run, train, train_together
    from neuraleraser.sae.training_log import TrainingLog

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Architecture",
    "MixingBuffer",
    "Run",
    "StepLog",
    "TrainSettings",
    "TrainingLog",
    "labelled_batches",
    "measure_sae",
    "pool_batches",
    "train",
    "train_together",
]

_HOME = {
    "ARCHITECTURES": "architectures",
    "SAE": "model",
    "Architecture": "architectures.architecture",
    "MixingBuffer": "mixing_buffer",
    "Run": "training",
    "StepLog": "train_settings",
    "TrainSettings": "train_settings",
    "TrainingLog": "training_log",
    "labelled_batches": "memory_batches",
    "measure_sae": "quality",
    "pool_batches": "memory_batches",
    "train": "training",
    "train_together": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value
