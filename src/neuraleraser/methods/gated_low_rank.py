"""GLoCE, Lee, Lim and Chun, CVPR 2025, arXiv 2503.12356: gated low-rank adaptation for localized concept erasure.

Published (paper, and Hyun1A/GLoCE at 458b1c6): at the output layer of each cross-attention an image token x becomes

    (1 - s) x + s (m_s + V_s V_s' (I - V_t V_t') (x - m_t)),

with means m and leading principal axes V (orthonormal columns) of the outputs for prompts of what stands in the
concept's place (s) and of the concept (t), over images, steps and positions of the conditional half. The gate is

    s = sigmoid(slope (|V_g' (x - m_g) / |x - m_g||^2 - centre)),

with m_g of general prompts and V_g the leading axes of the concept's second moments about m_g. For prompts of concepts
that stay, the largest value in the gate's brackets is noted of each map; its mean and spread over maps give
centre = mean + threshold * spread and slope = log(99) / (0.1 threshold * spread), so that s is 0.01 and 0.99 a tenth of
threshold * spread beside the centre. All ranks are 1 and threshold 2.5 for artists. The code leaves the first 10 of its
50 steps alone, edits both halves, and picks what stays among a list by likeness to the concept.

Ours: one concept, so no largest gate of several. The first steps are a share of the timesteps, not a count of calls.
Statistics are of single positions; the code adds maps that are averaged over 2, 4 and 8 positions. Who measures names
what stays. s is 0 only where it is too small for float32, so most images change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.concepts import Pair
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import weights_digest
from neuraleraser.settings import Sampling, check_number, check_whole
from neuraleraser.sites import EditContext, Site, denoiser, edit, unwrap
from neuraleraser.sites.modules import denoiser_name


@dataclass(frozen=True, eq=False)
class GatedReplacement:
    """Replacement at one layer: x -> (1 - s) x + s (instead + (x - shown) down up), s the gate of each position.

    instead, shown, origin [d]: means of what stands in the concept's place, of the concept, and of general prompts.
    down [d, r], up [r, d]. axes [d, g]: what the gate projects on. centre, slope: of its sigmoid.
    """

    instead: Tensor
    shown: Tensor
    down: Tensor
    up: Tensor
    origin: Tensor
    axes: Tensor
    centre: float
    slope: float

    def tensors(self) -> dict[str, Tensor]:
        """Return all that acts, by name."""
        numbers = torch.tensor([self.centre, self.slope])
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)} | {"numbers": numbers}

    def gate(self, x: Tensor) -> Tensor:
        """Return how far each position is replaced: x [..., d] -> [...] in 0 to 1."""
        return torch.sigmoid(self.slope * (gate_evidence(x, self.origin, self.axes) - self.centre))

    def delta(self, x: Tensor) -> Tensor:
        """Return the change of activations, in float32 at least: x [..., d] -> [..., d]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        instead, shown, down, up = (v.to(x) for v in (self.instead, self.shown, self.down, self.up))
        return self.gate(x)[..., None] * (instead + (x - shown) @ down @ up - x)


def gate_evidence(x: Tensor, origin: Tensor, axes: Tensor) -> Tensor:
    """Return the squared length of the part of x's direction from the origin that lies in the axes: [..., d] -> [...]
    in 0 to 1."""
    away = torch.nn.functional.normalize(x - origin.to(x), dim=-1)
    return (away @ axes.to(x)).square().sum(-1)


@dataclass(frozen=True, eq=False)
class GLoCE(Untraced):
    """GLoCE: outputs of all cross-attentions are replaced where they look like the concept's.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        layers: Replacement of each cross-attention's output.
        last_timestep: The highest timestep at which it acts.
        prompts: Prompts that it was measured on.
        seeds: First and last seed of images that it was measured on.

    Examples:
        >>> pairs = [Pair("a cat in Van Gogh style", "a cat")]
        >>> method = GLoCE.measure(pipe, "Van_Gogh", "style", pairs, ["a cat in mosaic style"], [0], quick, untouched=0)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    layers: Mapping[Site, GatedReplacement]
    last_timestep: float
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)
    name: str = "gloce"

    @property
    def key(self) -> str:
        """Digest of the layers and the timestep."""
        tensors = {f"{site} {name}": x for site, layer in self.layers.items() for name, x in layer.tensors().items()}
        return f"{weights_digest(tensors)}-{self.last_timestep!r}"

    @property
    def made_with(self) -> MadeWith:
        """Its prompts and seeds."""
        return MadeWith(seeds=(self.seeds,), prompts=self.prompts)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Replace outputs of the cross-attentions.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method acts everywhere.

        Raises:
            SiteError: The pipeline does not have the cross-attentions.
        """
        return edit(pipe, {site: self._replace(layer) for site, layer in self.layers.items()})

    def _replace(self, layer: GatedReplacement) -> Callable[[Tensor, EditContext[Any]], Tensor]:
        def replaced(x: Tensor, context: EditContext[Any]) -> Tensor:
            acts = (context.timestep <= self.last_timestep).to(x.dtype)
            return layer.delta(x).to(x) * acts[:, None, None]

        return replaced

    @classmethod
    def measure(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        pairs: Sequence[Pair],
        stays: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        general: Sequence[str] = (),
        rank: int = 1,
        gate_rank: int = 1,
        threshold: float = 2.5,
        untouched: float = 0.2,
    ) -> GLoCE:
        """Measure the replacements on images: in closed form, without training.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            pairs: Prompts with the concept, and with what stands in its place.
            stays: Prompts of concepts that stay, as like it as can be.
            seeds: Seeds of the images, for each list of prompts from the first on; at least as many as in the longest.
            sampling: How images are generated.
            general: General prompts, from whose mean the gate looks; none: those with what stands in its place.
            rank: Axes of the replacement, and of the concept's that are taken out of it.
            gate_rank: Axes of the gate.
            threshold: How many spreads above what stays the gate is half open.
            untouched: Share of the timesteps, the noisiest, at which nothing is replaced.

        Returns:
            The method.

        Raises:
            SettingsError: The denoiser has no cross-attentions of diffusers' names, there are too few prompts or seeds,
                or a number is out of range.
        """
        module = unwrap(denoiser(pipe))
        names = [name for name, _ in module.named_modules() if name.endswith(".attn2")]
        if not names:
            raise SettingsError(f"{type(module).__name__} has no cross-attentions called attn2: GLoCE edits these")
        for what, number in (("rank", rank), ("gate_rank", gate_rank)):
            check_whole(what, number, 1, 2**16)
        check_number("threshold", threshold, 0, 1e6, above=True)
        check_number("untouched", untouched, 0, 1)
        shown, instead = [p.positive for p in pairs], [p.negative for p in pairs]
        longest = max(len(shown), len(stays), len(general))
        if not pairs or not stays or len(seeds) < longest:
            raise SettingsError(
                f"there are {len(pairs)} pairs, {len(stays)} prompts that stay and {len(seeds)} seeds: pass some of "
                f"each, and at least {longest} seeds"
            )
        sites = [Site(f"{denoiser_name(pipe)}.{name}") for name in names]
        target = _moments(pipe, sites, shown, seeds, sampling)
        surrogate = _moments(pipe, sites, instead, seeds, sampling)
        looks = _moments(pipe, sites, general, seeds, sampling) if general else surrogate
        origins = {site: looks[site].mean for site in sites}
        axes = {site: _leading(target[site].about(origins[site]), gate_rank) for site in sites}
        peaks, times = _peaks(pipe, origins, axes, stays, seeds, sampling)
        layers = {}
        for site in sites:
            to, out = _leading(surrogate[site].covariance, rank), _leading(target[site].covariance, rank)
            # x V_s: onto the axes of what stands in its place, without the concept's.
            down = to - out @ (out.T @ to)
            spread = float(peaks[site].std()) if len(peaks[site]) > 1 else 0.0
            spread = max(spread, 1e-6)
            layers[site] = GatedReplacement(
                *(v.float() for v in (surrogate[site].mean, target[site].mean, down, to.T, origins[site], axes[site])),
                centre=float(peaks[site].mean()) + threshold * spread,
                slope=math.log(99) / (0.1 * threshold * spread),
            )
        prompts = tuple(dict.fromkeys([*shown, *instead, *stays, *general]))
        used = list(seeds)[:longest]
        return cls(concept, kind, layers, (1 - untouched) * max(times), prompts, (min(used), max(used)))


@dataclass
class _Moments:
    """First and second moments of vectors, in float64."""

    count: int
    total: Tensor
    products: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean [d]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance [d, d]."""
        return self.products / self.count - torch.outer(self.mean, self.mean)

    def about(self, origin: Tensor) -> Tensor:
        """Return the second moments [d, d] about another point."""
        return self.covariance + torch.outer(self.mean - origin, self.mean - origin)


def _moments(
    pipe: Any, sites: Sequence[Site], prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> dict[Site, _Moments]:
    """Draw images; return the moments over images, steps and positions of the conditional half, by site."""
    found: dict[Site, _Moments] = {}

    def on_activations(batch: ActivationBatch) -> None:
        if batch.branch == CONDITIONAL:
            x = batch.x[: len(batch.images)].detach().flatten(0, 1).double().cpu()
            seen = found.get(batch.site, _Moments(0, torch.zeros(1), torch.zeros(1)))
            found[batch.site] = _Moments(seen.count + len(x), seen.total + x.sum(0), seen.products + x.T @ x)

    collect(pipe, prompts, list(seeds)[: len(prompts)], sites, on_activations, sampling)
    return found


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors [d, rank] of a symmetric matrix."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :rank]


def _peaks(
    pipe: Any,
    origins: Mapping[Site, Tensor],
    axes: Mapping[Site, Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
) -> tuple[dict[Site, Tensor], list[float]]:
    """Draw images; return the gate's largest evidence in each map of the conditional half, by site, and timesteps."""
    found: dict[Site, list[Tensor]] = {site: [] for site in origins}
    times: set[float] = set()

    def on_activations(batch: ActivationBatch) -> None:
        times.add(batch.timestep)
        if batch.branch == CONDITIONAL:
            x = batch.x[: len(batch.images)].detach().double().cpu()
            found[batch.site].append(gate_evidence(x, origins[batch.site], axes[batch.site]).amax(1))

    collect(pipe, prompts, list(seeds)[: len(prompts)], list(origins), on_activations, sampling)
    return {site: torch.cat(peaks) for site, peaks in found.items()}, sorted(times)
