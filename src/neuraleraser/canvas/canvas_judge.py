"""The canvas's own two judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neuraleraser.canvas.judge import SIZE, Judge, judge_path, load_judge
from neuraleraser.canvas.judge_nets import Which
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import SettingsError
from neuraleraser.judges.judgement import Judgement, check


class CanvasJudge:
    """One of the canvas's two judges; only "second" measures artefacts.

    styles, objects: the names, in the order of the columns.
    thresholds: the probability above which each of them is there.
    artefact_threshold: the distance that 99 % of held-out renders stay below, None without one.
    figures: accuracies on held-out renders that neither training nor calibration used.

    Examples:
        >>> judge = CanvasJudge.load("second")
        >>> seen = judge(images)
        >>> [judge.styles[i] for i in seen.p_style.argmax(1)]
        ['Van_Gogh', 'Seed_Images']
    """

    def __init__(self, judge: Judge) -> None:
        self.styles, self.objects = STYLES, OBJECTS
        self.thresholds = dict.fromkeys(STYLES, judge.style_threshold)
        self.thresholds |= dict(zip(OBJECTS, judge.object_thresholds, strict=True))
        self.artefact_threshold = judge.artefact_threshold
        self.figures = judge.figures
        self._judge = judge

    @classmethod
    def load(cls, which: Which, path: Path | None = None) -> CanvasJudge:
        """Open the shipped judge "first" or "second", or another file of one at `path`.

        Raises SettingsError for another name, FileError for a missing or damaged file.
        """
        if which not in ("first", "second"):
            raise SettingsError(f"there is no canvas judge {which!r}: pass 'first' or 'second'")
        return cls(load_judge(path or judge_path(which)))

    def __call__(self, images: NDArray[np.uint8]) -> Judgement:
        """Judge `images`, uint8 RGB [N, 64, 64, 3]; N may be 0. Raises DataError for anything else.

        An image's figures do not depend on its neighbours, but for rounding (about 1e-5).
        """
        check(images, SIZE)
        p_style, p_object, artefact = self._judge(images)
        return Judgement(p_style.numpy(), p_object.numpy(), None if artefact is None else artefact.numpy())
