"""Distances between the images of a method and the base model's, in the features of the judge, or of a CLIP where the
judge has none: KID and FID.

Taken over images that do not ask for the erased concept, each beside its base twin, so that doing nothing scores 0.

- `kid`: the squared maximum mean discrepancy with the kernel (x y / d + 1)^3, times 1000 as papers print it. Published:
  Binkowski et al. 2018 (arXiv 1801.01401), of two samples that are independent. Ours: images are twins, so the sum runs
  over pairs of different images in the cross term, too (Gretton et al. 2012, lemma 6). Without that, a method that
  changes nothing would score below 0. It is unbiased at any n. The interval is a bootstrap over images.
- `fid`: Heusel et al. 2017 (arXiv 1706.08500), by torchmetrics. It is biased upwards at small n, so read `kid` there.

Published figures are in Inception's features. These are in others, so they compare methods that were measured in the
same ones, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.errors import DataError
from neuraleraser.evaluation.figures import spaced_sample
from neuraleraser.evaluation.intervals import CONFIDENCE, RESAMPLES, Estimate
from neuraleraser.evaluation.measure import ErasureFigures
from neuraleraser.evaluation.protocol import GRID, PROMPTS, Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.judges import FeatureJudge

MOST_IMAGES = 500
"""Images of a method that are read again for their features, at most."""
FEWEST_IMAGES = 10
"""Images below which no distance and no mean score is given."""
Known = dict[tuple[str, int, str], NDArray]
"""Features of base images by cell."""
_BATCH = 32


@dataclass(frozen=True)
class FeatureDistance:
    """Distances of one method's images from the base model's, in the judge's features.

    Examples:
        >>> import numpy as np
        >>> from neuraleraser.evaluation.feature_distances import feature_distance
        >>> features = np.random.default_rng(0).normal(size=(20, 4))
        >>> same = feature_distance(features, features)
        >>> abs(same.kid.value) < 1e-9, same.kid.n, same.fid < 1e-6
        (True, 20, True)
    """

    kid: Estimate
    """Times 1000; its n is that of `fid`, too."""
    fid: float


def feature_distance(base: NDArray, after: NDArray, *, seed: int = 0) -> FeatureDistance:
    """Return the distances of images from their twins.

    Args:
        base: Features of the base model's images, [n, d].
        after: Features of their twins, in the same order, [n, d].
        seed: Seed of the bootstrap.

    Returns:
        The distances.

    Raises:
        DataError: The shapes differ, or there are fewer than two images.
    """
    if base.shape != after.shape or base.ndim != 2 or len(base) < 2:
        raise DataError(
            f"features have the shapes {base.shape} and {after.shape}: expected [n, d] twice, n of 2 or more"
        )
    x, y = base.astype(np.float64), after.astype(np.float64)
    return FeatureDistance(_kid(x, y, seed), _fid(x, y))


def distances(
    erasures: Sequence[ErasureFigures],
    run: RunFolder,
    protocol: EvaluationProtocol,
    judge: FeatureJudge,
    *,
    unit_length: bool = False,
    known: Known | None = None,
) -> dict[tuple[str, str], FeatureDistance]:
    """Return the distances by method and concept, from the pictures in the run's folder; none where a concept has
    fewer than `FEWEST_IMAGES` images that count.

    unit_length: True for features of length 1, as CLIP's are. They are made sqrt(d) long, as KID's kernel divides by d
    and would hardly tell them apart. known: features of base images that others made already, or will use.
    """
    found, known = {}, {} if known is None else known
    for e in erasures:
        cells = sampled(c for c in protocol.cells[e.concept] if is_other(c, e.concept))
        if cells:
            base, after = paired_features(cells, e, run, judge, known)
            length = base.shape[1] ** 0.5 if unit_length else 1.0
            found[e.method, e.concept] = feature_distance(length * base, length * after)
    return found


def is_other(cell: Cell, concept: str) -> bool:
    """Return True for a cell of the grid, or a prompt of a file, that does not ask for the concept."""
    return cell.group in (GRID, PROMPTS) and not cell.asks_for(concept)


def sampled(cells: Iterable[Cell]) -> list[Cell]:
    """Return `MOST_IMAGES` of some cells, spread evenly, or all if they are fewer; none below `FEWEST_IMAGES`."""
    every = list(cells)
    some = list(dict.fromkeys(spaced_sample(every, min(MOST_IMAGES, len(every)))))
    return some if len(some) >= FEWEST_IMAGES else []


def paired_features(
    cells: Sequence[Cell],
    e: ErasureFigures,
    run: RunFolder,
    judge: FeatureJudge,
    known: Known,
) -> tuple[NDArray, NDArray]:
    """Return features of the base's and the method's images, [n, d] each; those of the base are kept in `known`."""
    rows = []
    for first in range(0, len(cells), _BATCH):
        some = cells[first : first + _BATCH]
        base = [run.image(BASE, "", c) for c in some]
        after = [run.image(e.method, e.concept, c) for c in some]
        new = [i for i, c in enumerate(some) if c.key not in known]
        known |= {some[i].key: f for i, f in _judged(judge, base, new)}
        changed = dict(_judged(judge, after, [i for i in range(len(some)) if not np.array_equal(base[i], after[i])]))
        rows += [(known[c.key], changed.get(i, known[c.key])) for i, c in enumerate(some)]
    return np.stack([b for b, _ in rows]), np.stack([a for _, a in rows])


def _judged(judge: FeatureJudge, images: Sequence[NDArray], chosen: Sequence[int]) -> list[tuple[int, NDArray]]:
    if not chosen:
        return []
    return list(zip(chosen, judge.features(np.stack([images[i] for i in chosen])), strict=True))


def _kid(x: NDArray, y: NDArray, seed: int) -> Estimate:
    """[n, d] twice -> the statistic, times 1000; resampled images do not meet their own copies."""
    n = len(x)

    def kernel(a: NDArray, b: NDArray) -> NDArray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    cross = kernel(x, y)
    h = kernel(x, x) + kernel(y, y) - cross - cross.T
    np.fill_diagonal(h, 0)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    drawn = ((counts @ h) * counts).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = h.sum() / (n * (n - 1))
    return Estimate(1000 * float(value), n, 1000 * float(low), 1000 * float(high))


class _AsTheyAre(torch.nn.Module):
    """Features in the place of torchmetrics' network, which makes them of images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _fid(x: NDArray, y: NDArray) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(x.shape[1]))
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    return max(0.0, float(metric.compute()))  # of equal images rounding may give less
