"""Corrections: what is added while a gate is open. One class and one file a kind; `CORRECTION_KINDS` names them."""

from __future__ import annotations

from neuraleraser.eraser.corrections.correction import BatchedCorrection, Correction
from neuraleraser.eraser.corrections.low_rank import BatchedLowRank, LowRank
from neuraleraser.eraser.corrections.scaling import Scaling

CORRECTION_KINDS: dict[str, type[Correction]] = {kind.KIND: kind for kind in (LowRank, Scaling)}
"""Kinds of corrections by their name in files. A new kind is one more file, and one more name here."""

__all__ = ["CORRECTION_KINDS", "BatchedCorrection", "BatchedLowRank", "Correction", "LowRank", "Scaling"]
