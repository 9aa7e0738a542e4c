"""The eraser: a few features that detect a concept, a gate, and an edit; attached to a pipeline in one line.

    eraser = Eraser.load("van-gogh.safetensors")
    with attach(pipe, eraser):
        image = pipe("a cat in Van Gogh style").images[0]

In a script the context manager will do; a server loads erasers to stay, as it does LoRAs:

    load_eraser(pipe, "van-gogh.safetensors", name="van-gogh")
    set_erasers(pipe, ["van-gogh"], [0.5])

The law of the edit (DESIGN.md, law 2): x' = x + strength * gate * delta. The gate looks at one site with a few
SAE features, each firing against its own threshold, and pools their evidence over the image's own positions;
where it stays shut nothing is added, and the image keeps its bits. No row sees another.
"""

from __future__ import annotations

from neuraleraser.eraser.attach import ACTIONS, MAX_STRENGTH, attach
from neuraleraser.eraser.calls import disable_erasers, eraser_trace, load_eraser, set_erasers, unload_erasers
from neuraleraser.eraser.card import model_card
from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.parts import MODES, Correction, Gate, nearest
from neuraleraser.eraser.trace import Trace

__all__ = [
    "ACTIONS",
    "MAX_STRENGTH",
    "MODES",
    "Correction",
    "Eraser",
    "Gate",
    "Trace",
    "attach",
    "disable_erasers",
    "eraser_trace",
    "load_eraser",
    "model_card",
    "nearest",
    "set_erasers",
    "unload_erasers",
]
