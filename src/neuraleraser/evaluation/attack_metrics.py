"""The metrics of attacks: images of the base model and of a method, each drawn with what the same search, at the same
budget, found through it.

So the twins here have a prompt and a seed in common, and not the input that was found: that they differ says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.evaluation.intervals import Estimate, proportion
from neuraleraser.evaluation.metrics import PairedResults, estimate_or_none, shows_concept
from neuraleraser.evaluation.protocol import ATTACK
from neuraleraser.evaluation.route_metrics import ROUTE_METRICS


@dataclass(frozen=True)
class AttackFigures:
    """The figures of one attack on a method, and its budget in words.

    Examples:
        >>> from neuraleraser.evaluation.attack_metrics import AttackFigures
        >>> AttackFigures("learned embeddings", {}, "150 steps of 8 pictures").group
        'attack by learned embeddings'
    """

    attack: str
    figures: Mapping[str, Estimate | float | None]
    """shown_base, shown_after, sound_after and acted; with the seconds of both searches, where they are known."""
    budget: str = ""

    @property
    def group(self) -> str:
        """Group of its cells."""
        return f"{ATTACK}{self.attack}"


def sound_after(t: PairedResults, *, seed: int = 0) -> Estimate:
    """Share of images that show the concept with the method applied, and are no artefacts: a judge that must choose a
    name chooses one for noise, too. Raises DataError if there are no images, or the judge measures no artefacts."""
    limit = t.after.judge.artefact_threshold
    if limit is None:
        raise DataError("the judge measures no artefacts: pass one that does, or leave sound_after out")
    sound = shows_concept(t.after, t.kind, t.concept) & ~(t.after.artefact > limit)
    return proportion(sound, np.ones(len(t), dtype=bool), "images of an attack (sound_after)", seed)


ATTACK_METRICS: Mapping[str, Callable[..., Estimate]] = {**ROUTE_METRICS, "sound_after": sound_after}
"""The metrics of the pairs of one attack, by name."""


def attack_figures(t: PairedResults) -> list[AttackFigures]:
    """Return the figures of each attack, in the order in which they were run."""
    groups = [group for group in dict.fromkeys(t.after.group) if group.startswith(ATTACK)]
    return [
        AttackFigures(
            group.removeprefix(ATTACK),
            {
                name: estimate_or_none(metric, t.where(t.after.group == group))
                for name, metric in ATTACK_METRICS.items()
            },
        )
        for group in groups
    ]
