"""The eraser: a few features that detect a concept, a gate, and corrections; attached to a pipeline in one line.

    eraser = Eraser.load("van-gogh.safetensors")
    with attach(pipe, eraser):
        image = pipe("a cat in Van Gogh style").images[0]

In a script the context manager will do; a server loads erasers to stay, as it does LoRAs:

    load_eraser(pipe, "van-gogh.safetensors", name="van-gogh")
    set_erasers(pipe, ["van-gogh"], [0.5])

The law of the edit (docs/explanation/laws.md, law 2): x' = x + strength * gate * delta. The gate looks at one site
with a few SAE features, each firing against its own threshold, and pools their evidence over the image's own positions;
where it stays shut nothing is added, and the image keeps its bits. No row sees another.
"""

from __future__ import annotations

from neuraleraser.eraser.attach import ACTIONS, MAX_STRENGTH, attach, check_nothing_acts
from neuraleraser.eraser.corrections import CORRECTION_KINDS, Correction, LowRank
from neuraleraser.eraser.eraser import Eraser
from neuraleraser.eraser.gate import Gate, time_bin
from neuraleraser.eraser.guided import Guided
from neuraleraser.eraser.header import Calibration, EraserHeader
from neuraleraser.eraser.model_card import model_card
from neuraleraser.eraser.pipeline_api import (
    delete_erasers,
    disable_erasers,
    enable_erasers,
    eraser_trace,
    get_active_erasers,
    get_list_erasers,
    load_eraser,
    set_erasers,
    unload_erasers,
)
from neuraleraser.eraser.provenance import Provenance
from neuraleraser.eraser.trace import Trace

__all__ = [
    "ACTIONS",
    "CORRECTION_KINDS",
    "MAX_STRENGTH",
    "Calibration",
    "Correction",
    "Eraser",
    "EraserHeader",
    "Gate",
    "Guided",
    "LowRank",
    "Provenance",
    "Trace",
    "attach",
    "check_nothing_acts",
    "delete_erasers",
    "disable_erasers",
    "enable_erasers",
    "eraser_trace",
    "get_active_erasers",
    "get_list_erasers",
    "load_eraser",
    "model_card",
    "set_erasers",
    "time_bin",
    "unload_erasers",
]
