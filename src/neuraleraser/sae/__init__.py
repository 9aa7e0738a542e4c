"""Sparse autoencoders over activations: the model, its training as a function over a stream, its measures.

Nothing here knows an image or a pipeline. Names load when first used, so that `neuraleraser.sae.settings`
stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuraleraser.sae.measures import measure
    from neuraleraser.sae.model import SAE
    from neuraleraser.sae.pool import labelled_batches, pool_batches
    from neuraleraser.sae.settings import Architecture, StepLog, TrainSettings
    from neuraleraser.sae.training import train

__all__ = ["SAE", "Architecture", "StepLog", "TrainSettings", "labelled_batches", "measure", "pool_batches", "train"]

_HOME = {
    "SAE": "model",
    "Architecture": "settings",
    "StepLog": "settings",
    "TrainSettings": "settings",
    "labelled_batches": "pool",
    "measure": "measures",
    "pool_batches": "pool",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value
