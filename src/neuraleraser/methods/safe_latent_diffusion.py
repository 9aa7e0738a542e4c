"""Safe Latent Diffusion (SLD), Schramowski, Brack, Deiseroth and Kersting, CVPR 2023, arXiv 2211.05105.

Published, as diffusers' deprecated pipeline computes it: with c, u and n the noise predicted for the image's prompt,
the empty one and the concept's,

    mu = min(1, strength |c - n|) where c - n < threshold, by element, else 0,
    gamma = mu (n - u) + momentum_scale m,
    m' = momentum m + (1 - momentum) gamma,

and guidance of scale w gives u + w (c - u - gamma) from step `warm_up` on, u + w (c - u) before; m is 0 at first. The
paper has max(1, .) in mu; its code, and so the settings that it names, have min.

Settings of the paper, as strength, threshold, warm_up, momentum_scale, momentum: weak 200 (diffusers: 20), 0, 15, 0, 0;
medium 1000, 0.01, 10, 0.3, 0.4; strong 2000, 0.025, 7, 0.5, 0.7; max 5000, 1, 0, 0.5, 0.7, of 50 steps.

Ours: the change is made in the conditional prediction, c - gamma, on which classifier-free guidance then acts, which is
the same. Other predictions than of noise are compared by the noise that they imply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.methods.conditional import GuidanceMethod, Update, method_key
from neuraleraser.settings import check_number, check_whole
from neuraleraser.sites import NoiseLevel


@dataclass(frozen=True)
class SafeLatentDiffusion(GuidanceMethod):
    """Safe Latent Diffusion: moves away from a prompt where the image's own prediction is near its.

    It needs no training, and one more forward of two rows an image in each step. Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        prompt: Prompt that shows the concept and nothing else.
        strength: Factor of the distance of two predictions, 0 to 1e5; it is held at 1.
        threshold: Difference of two predictions from which on an element is safe, -100 to 100.
        warm_up: Steps at first in which nothing changes.
        momentum_scale: Weight of earlier steps in a step, 0 to 1.
        momentum: Share of the earlier that is kept from step to step, 0 to 1.

    Raises:
        SettingsError: A number is out of range.

    Examples:
        >>> method = SafeLatentDiffusion("Van_Gogh", "style", "in Van Gogh style")
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    prompt: str
    strength: float = 5000.0
    threshold: float = 1.0
    warm_up: int = 0
    momentum_scale: float = 0.5
    momentum: float = 0.7
    name: str = "sld"
    made_with: None = None

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, 1e5)
        check_number("threshold", self.threshold, -100, 100)
        check_whole("warm_up", self.warm_up, 0, 1000)
        check_number("momentum_scale", self.momentum_scale, 0, 1)
        check_number("momentum", self.momentum, 0, 1)

    @property
    def key(self) -> str:
        """Digest of the prompt and the numbers."""
        numbers = (self.strength, self.threshold, self.warm_up, self.momentum_scale, self.momentum)
        return method_key(self.prompt, *numbers)

    def _update(self, guidance: float) -> Update:
        return _Momentum(self)


@dataclass
class _Momentum:
    """Update of one drawing. step: steps so far. earlier: the momentum [images, ...]."""

    method: SafeLatentDiffusion
    step: int = 0
    earlier: Tensor | None = None

    def __call__(self, conditional: Tensor, without: Tensor, shown: Tensor, level: NoiseLevel) -> Tensor:
        m, distance = self.method, level.slope * (conditional - shown)
        mu = torch.where(distance < m.threshold, (m.strength * distance.abs()).clamp(max=1), 0)
        gamma = mu * (level.slope * (shown - without))
        if self.earlier is not None:
            gamma = gamma + m.momentum_scale * self.earlier
            self.earlier = m.momentum * self.earlier + (1 - m.momentum) * gamma
        else:
            self.earlier = (1 - m.momentum) * gamma
        self.step += 1
        acts = self.step > m.warm_up and level.slope > 0  # in pure noise a prediction may say nothing of the noise
        return -gamma / level.slope if acts else torch.zeros_like(gamma)
