"""Patch Embedding Replacement (PER), Cassano, Renzulli, Ahmed, Grangetto and Alaniz, arXiv 2606.31699, ECCV 2026.

Published (abstract and project page; the code and the details were not to be had): an SAE only detects. Where features
of the object fire, at every step, the patch's activation is replaced by that of a patch of the same feature map in
which they do not; nothing is scaled, so activations stay where the model knows them. It stands on other works' features
(SAeUron's, SAEmnesia's) and has no strength.

Ours: each detected patch draws its own source, evenly of all that are not detected; the draws depend on the seed, the
timestep and the position alone, never on the other images of a batch. Where every patch is detected there is no source,
and the map is left alone, as may be that of a picture in a style: the paper erases objects.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser import Eraser
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.eraser.gate import time_bin
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.untraced import Untraced
from neuraleraser.settings import check_seed
from neuraleraser.sites import EditContext, edit


@dataclass(frozen=True)
class PatchReplacement(Untraced):
    """PER: patches in which an eraser's features fire are replaced by others of the same feature map.

    Features are those that the eraser scales, at the timesteps and above the thresholds at which it does
    (`fit_saeuron`); of an eraser with another correction, those of its gate that speak for the concept. They are looked
    for where its gate is open; as everywhere, a prompt gate leaves negative prompts alone, an image gate does not. The
    eraser's corrections do not act. A map without a detected patch, or with nothing else, keeps its bits: so it is with
    a prompt gate whose feature fires at every position.

    Attributes:
        eraser: The eraser whose features detect.
        seed: Seed of the draws.

    Raises:
        SettingsError: The seed is out of range.

    Examples:
        >>> settings = SAeUronSettings(num_images=2)
        >>> near, sae = ["mosaic style"], "image-sae.safetensors"
        >>> detects = fit_saeuron(pipe, concept, neighbours=near, sae=sae, settings=settings, sampling=quick)
        >>> method = PatchReplacement(detects)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    eraser: Eraser
    seed: int = 0
    name: str = "patch-replacement"

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.eraser.name

    @property
    def kind(self) -> str:
        """ "style", "object" or "other"."""
        return EraserMethod(self.eraser).kind

    @property
    def key(self) -> str:
        """Digest of the eraser and the seed."""
        return f"{self.eraser.content_hash[:16]}-{self.seed}"

    @property
    def made_with(self) -> MadeWith:
        """The eraser's data.

        Raises:
            SplitError: The eraser's header does not say which seeds it was made with.
        """
        return EraserMethod(self.eraser).made_with

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Replace detected patches.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None.

        Raises:
            SiteError: The pipeline does not have the gate's site.
        """
        return edit(pipe, {self.eraser.gate.site: self._replace})

    def detected(self, x: Tensor, timestep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return where features fire while the gate is open.

        Args:
            x: Activations, [B, P, d].
            timestep: Timesteps, [B].
            grid: Height and width of the P positions, where the gate reads windows.

        Returns:
            bool [B, P].
        """
        gate = self.eraser.gate.to(x.device)
        blocked = [c for c in self.eraser.corrections if isinstance(c, Scaling) and c.site == gate.site]
        if blocked:
            fires = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            for c in blocked:
                c = Scaling.from_tensors(c.site, {name: v.to(x.device) for name, v in c.tensors().items()})
                scaled = c.factor.index_select(0, time_bin(c.times, timestep)) != 1  # [B, f]
                pre = torch.nn.functional.linear(x.to(c.rows), c.rows, c.bias)
                above = pre > c.threshold.index_select(0, time_bin(c.times, timestep))[:, None]
                fires = fires | (above & scaled[:, None]).any(-1)
        else:
            fires = (gate.activations(x, grid)[..., gate.weight > 0] > 0).any(-1)
        return fires & (gate(x, timestep, grid) > 0)[:, None]

    def _replace(self, x: Tensor, context: EditContext[Any]) -> Tensor | None:
        found = self.detected(x.detach(), context.timestep, context.grid)
        drawn = None if self.eraser.gate.picture else context.rows.rows_with_prompt(len(x))
        if drawn is not None:
            found = found & torch.tensor(drawn, device=x.device)[:, None]
        found = found & ~found.all(1, keepdim=True)
        if not bool(found.any()):
            return None
        free = (~found).sum(1, keepdim=True)
        draws = self._draws(context.timestep, x.shape[1]).to(x.device)
        rank = (draws * free).long().clamp(max=x.shape[1] - 1).minimum(free - 1)
        sources = found.to(torch.int8).argsort(dim=1, stable=True).gather(1, rank)  # those that are free come first
        other = x.gather(1, sources[..., None].expand_as(x))
        return torch.where(found[..., None], other - x, torch.zeros_like(x))

    def _draws(self, timestep: Tensor, positions: int) -> Tensor:
        """Return a number in [0, 1) for each row and position [B, P], the same for rows of one timestep."""
        rows: dict[float, Tensor] = {}
        for t in set(timestep.tolist()):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + round(1000 * t)) % 2**63)
            rows[t] = torch.rand(positions, generator=generator, dtype=torch.float64)
        return torch.stack([rows[t] for t in timestep.tolist()])
