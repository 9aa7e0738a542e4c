"""CASteer, Gaintseva, Ma, Liu, Benning, Slabaugh and Martinelli Boneschi, arXiv 2503.09630.

Published: at each cross-attention and step, s is the difference of the mean outputs, over positions and images, of
prompts with the concept and of their matches without it, as a unit vector. An output v of the conditional half becomes
v - strength <v, s> s wherever <v, s> > 0; the paper's strength is 2, a reflection, which keeps v's norm.

Ours: the vector of the nearest timestep that it was measured at, so that any number of steps can follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.concepts import Pair
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.mean_activations import sum_of_means
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import weights_digest
from neuraleraser.settings import Sampling, check_number
from neuraleraser.sites import EditContext, Site, denoiser, edit, unwrap
from neuraleraser.sites.modules import denoiser_name


@dataclass(frozen=True, eq=False)
class CASteer(Untraced):
    """CASteer: outputs of all cross-attentions are reflected where they point to the concept. Every image changes.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        vectors: Unit vectors [T, d] of each cross-attention.
        times: Timesteps [T] of the vectors.
        strength: Share of a vector that is taken away, 0 to 100.
        prompts: Prompts that it was measured on.
        seeds: First and last seed of images that it was measured on.

    Raises:
        SettingsError: The strength is out of range.

    Examples:
        >>> method = CASteer.measure(pipe, "red", "style", [Pair("a red car", "a car")], [0], quick)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    vectors: Mapping[Site, Tensor]
    times: Tensor
    strength: float = 2.0
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)
    name: str = "casteer"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, 100)

    @property
    def key(self) -> str:
        """Digest of the vectors, their timesteps and the strength."""
        tensors = {str(site): x for site, x in self.vectors.items()} | {"times": self.times}
        return f"{weights_digest(tensors)}-{self.strength!r}"

    @property
    def made_with(self) -> MadeWith:
        """Its prompts and seeds."""
        return MadeWith(seeds=(self.seeds,), prompts=self.prompts)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Reflect outputs of the cross-attentions.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method cannot tell where it acts.
        """
        return edit(pipe, {site: self._reflect(x) for site, x in self.vectors.items()})

    def _reflect(self, vectors: Tensor) -> Any:
        def delta(x: Tensor, context: EditContext[Any]) -> Tensor:
            nearest = (context.timestep.cpu()[:, None] - self.times[None]).abs().argmin(1)
            s = vectors[nearest].to(x)[:, None]  # [B, 1, d]
            along = (x * s).sum(-1, keepdim=True).clamp(min=0)
            change = -self.strength * along * s
            rows, blocks = context.rows, context.rows.prompt_blocks()
            asked = torch.zeros(len(rows.counts), rows.images, device=x.device, dtype=x.dtype)
            asked[blocks] = 1
            return change * asked.flatten().repeat_interleave(rows.frames(len(x)))[:, None, None]

        return delta

    @classmethod
    def measure(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        pairs: Sequence[Pair],
        seeds: Sequence[int],
        sampling: Sampling,
        strength: float = 2.0,
    ) -> CASteer:
        """Measure the vectors on images of some pairs of prompts.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            pairs: Prompts with the concept and without.
            seeds: One seed per pair, for both of its prompts.
            sampling: How images are generated.
            strength: Share of a vector that is taken away.

        Returns:
            The method.

        Raises:
            SettingsError: The denoiser has no cross-attentions of diffusers' names.
        """
        module = unwrap(denoiser(pipe))
        names = [name for name, _ in module.named_modules() if name.endswith(".attn2")]
        if not names:
            raise SettingsError(f"{type(module).__name__} has no cross-attentions called attn2: CASteer reads these")
        sites = [Site(f"{denoiser_name(pipe)}.{name}") for name in names]
        # The length of a difference of sums does not count, so they need not be means.
        with_concept = sum_of_means(pipe, sites, [p.positive for p in pairs], seeds, sampling)
        without = sum_of_means(pipe, sites, [p.negative for p in pairs], seeds, sampling)
        times = sorted(next(iter(with_concept.values())))
        vectors = {
            site: torch.nn.functional.normalize(
                torch.stack([with_concept[site][t] - without[site][t] for t in times]), dim=1
            )
            for site in sites
        }
        prompts = tuple(prompt for pair in pairs for prompt in (pair.positive, pair.negative))
        return cls(concept, kind, vectors, torch.tensor(times), strength, prompts, (min(seeds), max(seeds)))
