"""From prompts to activations: what a pipeline computes at chosen sites while it draws.

`collect` tells all of them, `bank` samples those of some images, `activation_stream` draws on and on for training,
and shards are such a stream, recorded. `substitution` puts an SAE's reconstructions in their place.
"""

from neuraleraser.activations.collecting import CONDITIONAL, UNCONDITIONAL, Sample, Seen, bank, collect, sample
from neuraleraser.activations.loss_recovered import AtTime, Substitution, substitution
from neuraleraser.activations.shards import Shards, write_shards
from neuraleraser.activations.streaming import activation_stream, described

__all__ = [
    "CONDITIONAL",
    "UNCONDITIONAL",
    "AtTime",
    "Sample",
    "Seen",
    "Shards",
    "Substitution",
    "activation_stream",
    "bank",
    "collect",
    "described",
    "sample",
    "substitution",
    "write_shards",
]
