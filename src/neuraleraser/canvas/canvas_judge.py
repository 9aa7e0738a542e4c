"""The canvas's own two judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neuraleraser.canvas.judge import SIZE, TrainedJudge, judge_path, load_judge
from neuraleraser.canvas.judge_nets import Which
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import SettingsError
from neuraleraser.judges.judgement import Judgement, check


class CanvasJudge:
    """One of the canvas's two judges; only "second" measures artefacts.

    Attributes:
        styles: Names of the styles, in the order of the columns.
        objects: Names of the objects, in the order of the columns.
        thresholds: The probability above which each of them is there.
        artefact_threshold: The distance that 99 % of held-out renders stay below; None for a judge that measures none.
        figures: Accuracies on held-out renders that neither training nor calibration used.

    Examples:
        >>> judge = CanvasJudge.load("second")
        >>> seen = judge(images)
        >>> [judge.styles[i] for i in seen.p_style.argmax(1)]
        ['Van_Gogh', 'Seed_Images']
    """

    def __init__(self, judge: TrainedJudge) -> None:
        self.styles, self.objects = STYLES, OBJECTS
        self.thresholds = dict.fromkeys(STYLES, judge.style_threshold)
        self.thresholds |= dict(zip(OBJECTS, judge.object_thresholds, strict=True))
        self.artefact_threshold = judge.artefact_threshold
        self.figures = judge.figures
        self._judge = judge

    @classmethod
    def load(cls, which: Which, path: Path | None = None) -> CanvasJudge:
        """Open a judge of the canvas.

        Args:
            which: "first" or "second".
            path: Another file of one; None: the one that ships.

        Returns:
            The judge.

        Raises:
            SettingsError: `which` is another name.
            FileError: The file is missing or damaged.
        """
        if which not in ("first", "second"):
            raise SettingsError(f"there is no canvas judge {which!r}: pass 'first' or 'second'")
        return cls(load_judge(path or judge_path(which)))

    def __call__(self, images: NDArray[np.uint8]) -> Judgement:
        """Judge images.

        An image's figures do not depend on its neighbours, but for rounding (about 1e-5).

        Args:
            images: RGB images, uint8 [N, 64, 64, 3]; N may be 0.

        Returns:
            The probabilities.

        Raises:
            DataError: `images` is anything else.
        """
        check(images, SIZE)
        p_style, p_object, artefact = self._judge(images)
        return Judgement(p_style.numpy(), p_object.numpy(), None if artefact is None else artefact.numpy())

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return what the judge's last layer reads.

        Args:
            images: RGB images, uint8 [N, 64, 64, 3]; one or more.

        Returns:
            Features, [N, 256] of the first judge and [N, 160] of the second.

        Raises:
            DataError: `images` is anything else.
        """
        check(images, SIZE)
        return self._judge.features(images).numpy()
