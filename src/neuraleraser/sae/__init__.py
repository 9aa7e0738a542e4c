"""Sparse autoencoders over activations: the model, its training as a function over a stream, its measures.

Nothing here knows an image or a pipeline. Names load when first used, so that `neuraleraser.sae.settings`
stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuraleraser.sae.log import TrainingLog
    from neuraleraser.sae.measures import measure
    from neuraleraser.sae.mixing import MixingPool
    from neuraleraser.sae.model import SAE
    from neuraleraser.sae.pool import labelled_batches, pool_batches
    from neuraleraser.sae.settings import Architecture, StepLog, TrainSettings
    from neuraleraser.sae.training import Run, train, train_together

__all__ = [
    "SAE",
    "Architecture",
    "MixingPool",
    "Run",
    "StepLog",
    "TrainSettings",
    "TrainingLog",
    "labelled_batches",
    "measure",
    "pool_batches",
    "train",
    "train_together",
]

_HOME = {
    "SAE": "model",
    "Architecture": "settings",
    "MixingPool": "mixing",
    "Run": "training",
    "StepLog": "settings",
    "TrainSettings": "settings",
    "TrainingLog": "log",
    "labelled_batches": "pool",
    "measure": "measures",
    "pool_batches": "pool",
    "train": "training",
    "train_together": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value
