"""From a concept to an eraser: choose the features that detect it, calibrate the gate, fit the least edit.

    eraser = fit(pipe, canvas_concept("Van_Gogh"))

Nothing here asks a judge: features are chosen by how they fire with and without the concept, and the edit is
fitted to the model's own predictions.
"""

from __future__ import annotations

from neuraleraser.fit.calibrating import calibrate
from neuraleraser.fit.dictionary import Dictionary, load_dictionary
from neuraleraser.fit.fitting import fit
from neuraleraser.fit.importing import import_dictionary
from neuraleraser.fit.own import own_dictionary

__all__ = ["Dictionary", "calibrate", "fit", "import_dictionary", "load_dictionary", "own_dictionary"]
