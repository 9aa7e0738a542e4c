"""Control: an eraser whose gate reads random features of its SAE, which fire as often as its own.

Where it erases as well, nothing was gained by choosing the features. Of one seed the figure is a lottery ticket: take
several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from neuraleraser.eraser import Eraser
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.fitting.reference import Reference
from neuraleraser.fitting.trajectories import SHARES
from neuraleraser.methods.eraser_control import EraserControl, prompt_part
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.settings import check_seed, check_whole


@dataclass(frozen=True)
class RandomFeatures(EraserControl):
    """An eraser's corrections behind a gate of random features that fire as often as its own.

    For each feature of the gate one is drawn among those of the reference that are nearest in firing rate (the share
    of the reference's rows and timesteps in which it fires at all); its weight is scaled so that on average it adds to
    the evidence what the other did. Bounds and corrections are the eraser's. The eraser's image gate and guided
    correction are left out: compare with the eraser without them.

    Attributes:
        eraser: The eraser.
        reference: The reference that it was made with.
        seed: Seed of the draws.
        among: Features, nearest in firing rate, that one is drawn from.

    Raises:
        SettingsError: The reference is of another site or SAE than the gate, too few of its features fire, or a number
            is out of range.

    Examples:
        >>> method = RandomFeatures(eraser, reference)
        >>> with method.applied(pipe) as trace:
        ...     drawn = generate(pipe, prompts, [0, 1], quick)
        >>> set(method.control.gate.features.tolist()).isdisjoint(eraser.gate.features.tolist())
        True
    """

    eraser: Eraser
    reference: Reference
    seed: int = 0
    among: int = 20
    name: str = "random-features"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_whole("among", self.among, 1, 2**24)
        gate, sae = self.eraser.gate, self.reference.sae
        known = gate.site == self.reference.site and gate.window == 1 and gate.width == sae.d_in
        if known and bool((gate.features < sae.n_features).all()):
            # Files keep rows in half precision.
            known = torch.allclose(gate.rows, sae.W_enc[gate.features].float().cpu(), atol=1e-3, rtol=1e-2)
        else:
            known = False
        if not known:
            raise SettingsError(
                f"the gate of the eraser of {self.eraser.name!r} reads {gate.site}, with other features than those of "
                f"the reference of {self.reference.site}: pass the reference that it was made with"
            )
        usable = int((self._rates()[0] > 0).sum()) - len(gate.features)
        if usable < len(gate.features):
            raise SettingsError(
                f"{max(usable, 0)} other features of the reference fire, and the gate reads {len(gate.features)}: pass "
                "a reference of more prompts"
            )

    @property
    def key(self) -> str:
        """Digest of the eraser with its random gate."""
        return self.control.content_hash[:16]

    @property
    def made_with(self) -> MadeWith:
        """The eraser's data.

        Raises:
            SplitError: The eraser's header does not say which seeds it was made with.
        """
        return EraserMethod(self.eraser).made_with

    @cached_property
    def control(self) -> Eraser:
        """The eraser with the random gate."""
        gate, sae = self.eraser.gate, self.reference.sae
        rates, means = self._rates()
        free = rates > 0
        free[gate.features] = False
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[int] = []
        for feature in gate.features.tolist():
            apart = (rates - rates[feature]).abs().masked_fill(~free, torch.inf)
            near = apart.argsort(stable=True)[: min(self.among, int(free.sum()))]
            drawn.append(int(near[torch.randint(len(near), (1,), generator=generator)]))
            free[drawn[-1]] = False
        f = torch.tensor(drawn)
        own = means[gate.features]
        # A feature that the reference never saw fire has no mean to be matched.
        scale = torch.where(own > 0, own / means[f], 1.0)
        rows = sae.W_enc[f].float().cpu().clone()
        random = replace(
            gate,
            features=f,
            rows=rows,
            bias=sae.b_enc[f].float().cpu() - rows @ sae.b_dec.float().cpu(),
            threshold=sae.threshold[f].float().cpu().clone(),
            weight=gate.weight * scale,
        )
        return replace(prompt_part(self.eraser), gate=random)

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Return how often each feature of the reference fires, and its mean, pooled as the gate pools [n]."""
        share = min(range(len(SHARES)), key=lambda i: abs(SHARES[i] - self.eraser.gate.share))
        pooled = self.reference.pooled[:, :, share].flatten(0, 1)
        return (pooled > 0).float().mean(0), pooled.float().mean(0)
