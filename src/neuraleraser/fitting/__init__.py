"""From a concept to an eraser: choose the features that detect it, calibrate the gate, fit the least edit.

    eraser = fit(pipe, canvas_concept("Van_Gogh"))

Nothing here asks a judge: features are chosen by how they fire with and without the concept, and the edit is
fitted to the model's own predictions.
"""

from __future__ import annotations

from neuraleraser.fitting.calibrate import calibrate
from neuraleraser.fitting.fit import fit
from neuraleraser.fitting.fit_saeuron import fit_saeuron
from neuraleraser.fitting.import_reference import import_reference
from neuraleraser.fitting.make_reference import make_reference
from neuraleraser.fitting.reference import Reference

__all__ = ["Reference", "calibrate", "fit", "fit_saeuron", "import_reference", "make_reference"]
