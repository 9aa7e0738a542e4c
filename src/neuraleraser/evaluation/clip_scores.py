"""CLIP scores: how well images agree with their prompts, before and after.

The score of an image is 100 max(0, cos) of it and its prompt, as it is, in CLIP's space (Hessel et al. 2021, arXiv
2104.08718, equation 1, with the factor 100 that papers on erasure print, in place of 2.5). Images that do not ask for
the concept should keep theirs. Those that ask for it lose some of it, as the prompt still names the concept.

It depends on the checkpoint: compare scores of one CLIP alone. The interval is a bootstrap over images; fewer than
`FEWEST_IMAGES` have no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuraleraser.evaluation.feature_distances import Known, is_other, paired_features, sampled
from neuraleraser.evaluation.intervals import Estimate, mean
from neuraleraser.evaluation.measure import ErasureFigures
from neuraleraser.evaluation.protocol import MAIN_GROUPS, Cell, EvaluationProtocol
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.judges import ImageTextModel


@dataclass(frozen=True)
class ClipScores:
    """Mean CLIP scores of one method's images and of their base twins; None where there are no such images.

    Examples:
        >>> from neuraleraser.evaluation.clip_scores import ClipScores
        >>> from neuraleraser.evaluation.intervals import Estimate
        >>> named = Estimate(31.2, 40, 30.8, 31.6), Estimate(24.0, 40, 23.5, 24.5)
        >>> ClipScores(*named, None, None).target.value
        24.0
    """

    target_base: Estimate | None
    """Images of the base model that ask for the concept."""
    target: Estimate | None
    """The same with the method applied."""
    others_base: Estimate | None
    """Images of the base model that do not ask for it."""
    others: Estimate | None
    """The same with the method applied."""


def clip_scores(
    erasures: Sequence[ErasureFigures],
    run: RunFolder,
    protocol: EvaluationProtocol,
    clip: ImageTextModel,
    known: Known,
) -> dict[tuple[str, str], ClipScores]:
    """Return the scores by method and concept, from the pictures in the run's folder; `known` features of base images
    are not made again. Raises FileError for a picture that is gone."""
    found = {}
    for e in erasures:
        cells = protocol.cells[e.concept]
        target = [c for c in cells if c.group in MAIN_GROUPS and c.asks_for(e.concept)]
        others = [c for c in cells if is_other(c, e.concept)]
        scores = [_scores(some, e, run, clip, known) for some in (target, others)]
        found[e.method, e.concept] = ClipScores(*scores[0], *scores[1])
    return found


def _scores(
    cells: Sequence[Cell],
    e: ErasureFigures,
    run: RunFolder,
    clip: ImageTextModel,
    known: Known,
) -> tuple[Estimate | None, Estimate | None]:
    """Return the mean scores of some cells, at most `MOST_IMAGES` of them, before and after."""
    some = sampled(cells)
    if not some:
        return None, None
    texts = clip.text_features([c.prompt for c in some])
    base, after = (score(images, texts) for images in paired_features(some, e, run, clip, known))
    return mean(base), mean(after)


def score(images: NDArray, texts: NDArray) -> NDArray[np.float64]:
    """Return the CLIP score of each image [n, d] with its own sentence [n, d], vectors of length 1: [n]."""
    return 100 * np.maximum(0, (images.astype(np.float64) * texts).sum(1))
