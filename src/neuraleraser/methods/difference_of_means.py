"""Control: an eraser's own gate, behind which the difference of mean activations is subtracted.

The plainest steering there is (difference of means, contrastive activation addition): no training and no low rank.
Where it does as well as the eraser, the eraser owes its figures to its gate, not to its correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuraleraser.concepts import Pair
from neuraleraser.eraser import Eraser, check_nothing_acts
from neuraleraser.eraser.corrections import LowRank
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.eraser_control import EraserControl, prompt_part
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.mean_activations import sum_of_means
from neuraleraser.methods.weights import weights_digest
from neuraleraser.settings import Sampling, check_number
from neuraleraser.sites import Site


@dataclass(frozen=True, eq=False)
class DifferenceOfMeans(EraserControl):
    """An eraser's gate, and behind it the difference of means as correction.

    While the gate is open, strength times (mean with the concept - mean without) is subtracted from every position at
    the eraser's edit sites, at the nearest timestep that was measured. An image in which the gate stays shut has the
    base model's bits. The eraser's image gate and guided correction are left out: compare with the eraser without them.

    Attributes:
        eraser: The eraser whose gate and sites are used.
        differences: Difference of means [T, d] of each correction's site.
        times: Timesteps [T] of the differences, ascending.
        strength: Factor of the differences, 0 to 100.
        prompts: Prompts that it was measured on.
        seeds: First and last seed of images that it was measured on.

    Raises:
        SettingsError: The strength is out of range, or the differences are of other sites than the eraser's.

    Examples:
        >>> pairs = [Pair("a cat in Van Gogh style", "a cat")]
        >>> method = DifferenceOfMeans.measure(pipe, eraser, pairs, [0], quick)
        >>> with method.applied(pipe) as trace:
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> list(trace.fired), np.array_equal(erased[1], images[1])  # where the gate is shut: the same bits
        ([0], True)
    """

    eraser: Eraser
    differences: Mapping[Site, Tensor]
    times: Tensor
    strength: float = 1.0
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)
    name: str = "difference-of-means"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, 100)
        needed = {c.site for c in self.eraser.corrections}
        if needed != self.differences.keys():
            raise SettingsError(
                f"differences of {', '.join(map(str, sorted(self.differences)))}, and the eraser of "
                f"{self.eraser.name!r} edits {', '.join(map(str, sorted(needed)))}: measure them for this eraser"
            )

    @property
    def key(self) -> str:
        """Digest of the eraser, the differences, their timesteps and the strength."""
        tensors = {str(site): x for site, x in self.differences.items()} | {"times": self.times}
        return f"{self.eraser.content_hash[:16]}-{weights_digest(tensors)}-{self.strength!r}"

    @property
    def made_with(self) -> MadeWith:
        """The eraser's data, and its own prompts and seeds.

        Raises:
            SplitError: The eraser's header does not say which seeds it was made with.
        """
        gate = EraserMethod(self.eraser).made_with
        return replace(gate, seeds=(*gate.seeds, self.seeds), prompts=gate.prompts + self.prompts)

    @cached_property
    def control(self) -> Eraser:
        """The eraser with the differences as its corrections."""
        corrections = []
        for c in self.eraser.corrections:
            bias = -self.strength * self.differences[c.site].float()
            nothing = torch.zeros(*bias.shape, 1)  # of rank 1: a correction has to have one
            corrections.append(LowRank(c.site, self.times.float(), nothing, nothing.mT.contiguous(), bias, c.also))
        return replace(prompt_part(self.eraser), corrections=tuple(corrections))

    @classmethod
    def measure(
        cls,
        pipe: Any,
        eraser: Eraser,
        pairs: Sequence[Pair],
        seeds: Sequence[int],
        sampling: Sampling,
        strength: float = 1.0,
    ) -> DifferenceOfMeans:
        """Measure the differences on images of some pairs of prompts, over positions and images.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            eraser: The eraser whose gate and sites are used.
            pairs: Prompts with the concept and without.
            seeds: One seed per pair, for both of its prompts.
            sampling: How images are generated.
            strength: Factor of the differences.

        Returns:
            The method.

        Raises:
            SettingsError: There are no pairs, not as many seeds, or an eraser acts on the pipeline.
            SiteError: The pipeline does not have the eraser's sites.
        """
        check_nothing_acts(pipe, "measuring means")
        if not pairs or len(seeds) != len(pairs):
            raise SettingsError(f"there are {len(pairs)} pairs and {len(seeds)} seeds: pass one seed for each pair")
        sites = [c.site for c in eraser.corrections]
        shown = sum_of_means(pipe, sites, [p.positive for p in pairs], seeds, sampling)
        plain = sum_of_means(pipe, sites, [p.negative for p in pairs], seeds, sampling)
        times = sorted(shown[sites[0]])
        differences = {
            site: torch.stack([(shown[site][t] - plain[site][t]) / len(pairs) for t in times]) for site in sites
        }
        prompts = tuple(dict.fromkeys(prompt for pair in pairs for prompt in (pair.positive, pair.negative)))
        return cls(eraser, differences, torch.tensor(times), strength, prompts, (min(seeds), max(seeds)))
