"""From prompts to activations: what a pipeline computes at chosen sites while it draws.

`collect` tells all of them, `activation_matrix` samples those of some images, `activation_stream` draws on and on for
training, and shards are such a stream, recorded. `measure_loss_recovered` puts an SAE's reconstructions in their place.
"""

from neuraleraser.activations.collecting import (
    CONDITIONAL,
    UNCONDITIONAL,
    ActivationBatch,
    Sample,
    activation_matrix,
    collect,
    sample,
)
from neuraleraser.activations.loss_recovered import LossRecovered, TimestepLoss, measure_loss_recovered
from neuraleraser.activations.shards import Shards, write_shards
from neuraleraser.activations.streaming import activation_stream, stream_data

__all__ = [
    "CONDITIONAL",
    "UNCONDITIONAL",
    "ActivationBatch",
    "LossRecovered",
    "Sample",
    "Shards",
    "TimestepLoss",
    "activation_matrix",
    "activation_stream",
    "collect",
    "measure_loss_recovered",
    "sample",
    "stream_data",
    "write_shards",
]
